"""Results, and the tables, plots, advice and page that are made from them."""
