"""Other published defences, which change the image tower instead of the class prompts.

defense         what they share
finetuning      contrastive tuning of both towers (FT), and with self-supervision (CleanCLIP)
abd             the same on images with an adversarial patch
rvpt            visual prompts in a frozen tower

What is published and what is our reading of it: `docs/defenses.md`.
"""
