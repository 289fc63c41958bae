"""Figures of how a network's exits got on with one another, as the papers draw them."""
