export const vote = { show: async () => {} };
