"""Process meshes, DTensor helpers, collectives, and agreement between ranks: knows no config, model or optimizer."""
