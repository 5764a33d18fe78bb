"""Language models with users: soft prompts put in, generation, saving and loading."""
