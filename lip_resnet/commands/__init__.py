"""The commands: each module has ``main(options)``, which joins the parts of the package. ``lip_commands`` parses."""
