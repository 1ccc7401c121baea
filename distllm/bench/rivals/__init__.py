"""Other people's engines, each in processes of its own."""
