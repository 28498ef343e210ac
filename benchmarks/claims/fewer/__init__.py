"""How many forwards a method needs: several estimates, normalised steps, and first order, at equal forwards."""
