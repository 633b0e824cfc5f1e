"""Finds the suspected backdoor and tunes the class prompts against it; never sees an attacker's trigger."""
