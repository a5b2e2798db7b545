export const dial = { show: async () => {} };
