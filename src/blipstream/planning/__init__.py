"""How many machines a load needs: ``blipstream plan`` measures a bundle's stages here and simulates the server."""
