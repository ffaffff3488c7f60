"""One file a method; init, update, budget, backbone, cached, dropout and options are what several are made of."""
