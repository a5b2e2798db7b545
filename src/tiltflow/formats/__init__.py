"""What a run leaves for others: adapters, scheduler, contract, model card."""
