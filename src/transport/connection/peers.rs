//! Connections of each client address, so that one client cannot take every place.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;

/// Open connections by address; holds nothing of clients that have none.
pub(super) struct Peers {
    max: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
}

/// A connection that is counted for its client until this goes.
pub(in crate::transport) struct Counted {
    peers: Arc<Peers>,
    client: IpAddr,
}

impl Peers {
    /// `max` of zero is no limit.
    pub(super) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, open: Mutex::default() })
    }

    /// `None` when the client has as many as it may.
    pub(super) fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Counted> {
        let client = client(address);
        let mut open = self.open.lock();
        let count = open.entry(client).or_default();
        if self.max > 0 && *count >= self.max {
            return None;
        }
        *count += 1;
        Some(Counted { peers: Arc::clone(self), client })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut open = self.peers.open.lock();
        if let Some(count) = open.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.client);
            }
        }
    }
}

/// Who has an address: for IPv6 the network of 64 bits, which is what one subscriber gets.
fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let network = u128::from(v6) & (u128::from(u64::MAX) << 64);
            IpAddr::V6(Ipv6Addr::from(network))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_its_own_count() {
        let peers = Peers::new(2);
        let admit = |text: &str| peers.admit(text.parse().unwrap());
        let first = admit("2001:db8::1").unwrap();
        let _second = admit("2001:db8::ffff").unwrap();
        assert!(admit("2001:db8::2").is_none(), "one network, one client");
        let _other = admit("2001:db8:0:1::1").unwrap();
        let _v4 = admit("192.0.2.1").unwrap();
        let _mapped = admit("::ffff:192.0.2.1").unwrap();
        assert!(admit("192.0.2.1").is_none());
        drop(first);
        assert!(admit("2001:db8::3").is_some());
    }

    #[test]
    fn nothing_is_kept_of_who_left() {
        let peers = Peers::new(0);
        let many: Vec<_> =
            (0..100_u8).map(|at| peers.admit(IpAddr::from([10, 0, 0, at])).unwrap()).collect();
        assert_eq!(peers.open.lock().len(), 100);
        drop(many);
        assert!(peers.open.lock().is_empty());
    }
}
