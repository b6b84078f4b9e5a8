"""Low-cost customization: a frozen global expert, a tiny local expert and a gate, learned on the user's own device."""
