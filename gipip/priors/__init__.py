"""What an attacker learns from auxiliary images: autoencoders and generators."""
