"""What `benchmarks/fuzz.py` is made of: how inputs are spoiled, who reads them, and who watches the readers."""
