"""Parts of `benchmarks/fuzz.py`: how inputs are spoiled, who reads them, who watches the readers."""
