"""`ptuning validate-data`: what is in data files, what is wrong with them, and what lengths fit them."""
