"""Process meshes, DTensor helpers, collectives, and agreement between ranks. Knows no model and no optimizer."""
