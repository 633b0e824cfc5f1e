"""The red team: triggers and implants to measure defences with. Purification and defences never import it."""
