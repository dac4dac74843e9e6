"""The commands of ``glm-image``, one a module; importing a module adds its command to ``application.app``."""
