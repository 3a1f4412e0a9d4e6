"""What a network's downsampling layers attend to: importance maps, window weights and their entropy, as arrays.

``importance_maps`` runs a network on photographs and returns the maps of every site; ``windows`` reads one window,
``figures`` and ``gallery`` draw, and ``monitor`` observes a training run. ``pixels`` makes one map of all sites, and
``probes`` asks what such maps are worth. Built on ``ops`` and ``layers``.
"""

from lip_resnet.insight.importance import SiteMaps, importance_maps, sites_of

__all__ = ["SiteMaps", "importance_maps", "sites_of"]
