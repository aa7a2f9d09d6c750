"""A trained Llama of 4.8M parameters, its text, and the scripts that made both."""
