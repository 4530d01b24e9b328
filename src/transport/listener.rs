//! Accepts connections and tells the protocols apart.
