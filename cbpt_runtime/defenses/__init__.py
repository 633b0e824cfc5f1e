"""Other published defences, which change the image tower instead of the class prompts.

defense         what they share
finetuning      contrastive tuning of both towers (FT); CleanCLIP and ABD are built on it
cleanclip       with self-supervision on augmented images and captions
abd             on images with an adversarial patch
rvpt            visual prompts in a frozen tower
augmentation    AutoAugment for images, swaps and deletions for captions

What is published and what is our reading of it: `docs/defenses.md`.
"""
