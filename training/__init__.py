"""How a defense is made and measured: data, recipes, training, attacks, evaluation, export. Offline."""
