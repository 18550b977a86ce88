//! Hash tables of the core. In the simulation their order is always the same, so that a history can be replayed.

#[cfg(not(any(test, feature = "simulation")))]
type State = std::hash::RandomState;
#[cfg(any(test, feature = "simulation"))]
type State = std::hash::BuildHasherDefault<std::hash::DefaultHasher>;

/// A map whose keys come from the network: hashed with random keys.
pub type HashMap<K, V> = std::collections::HashMap<K, V, State>;
/// The same of a set.
pub type HashSet<K> = std::collections::HashSet<K, State>;
