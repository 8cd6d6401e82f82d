"""What runs in the peers' environments; imports nothing of Blipstream but where it says so."""
