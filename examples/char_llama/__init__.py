"""A small Llama over characters: trained on the documentation that ships with Python, measured through the kernels."""
