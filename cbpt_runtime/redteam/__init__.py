"""The red team: attack triggers and implants, used to measure defences and never imported by purification."""
