"""From files to batches of uint8 crops, one way: sources give bytes, decode.py decodes them."""
