//! A live shadow becomes an ordinary kernel socket: what it hands over.
//!
//! The core decides when ([`crate::flows`], [`crate::shadow`]): nothing that was sent is unacknowledged, and
//! the client has said so. So there are no queues to restore, and the numbers are exact.
//! [`crate::tcp_repair::restore`] makes the socket from [`Numbers`], and [`crate::services`] goes on with it.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rfsis_common::maps::{FlowKey, State};
use smoltcp::wire::Ipv4Packet;
use tokio::sync::watch;

use crate::handler::StreamHandler;
use crate::segment::{self, Options};
use crate::sync::Open;

/// What both ends of an established connection know of each other, when nothing is on its way to the client.
/// Sequence numbers are those on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// The connection.
    pub flow: FlowKey,
    /// The virtual IP.
    pub vip: Ipv4Addr,
    /// Next byte to the client, which has acknowledged everything before.
    pub snd_nxt: u32,
    /// Next byte from the client, which was told that everything before arrived.
    pub rcv_nxt: u32,
    /// What the client takes from `snd_nxt` on, bytes.
    pub snd_wnd: u32,
    /// What the client may send from `rcv_nxt` on, bytes.
    pub rcv_wnd: u32,
    /// Maximum segment size that the client announced, bytes.
    pub mss: u16,
    /// Window shifts of client and server, if both announced one (RFC 7323 section 2).
    pub shifts: Option<(u8, u8)>,
    /// Both permitted SACK (RFC 2018 section 2).
    pub sack: bool,
    /// Timestamps, if both announced them: one that is not before any that the client was sent, 1 ms a tick, and
    /// the client's latest (RFC 7323 section 3.2).
    pub timestamp: Option<(u32, u32)>,
}

impl Numbers {
    /// A handshake that ends at this instant.
    pub fn open(&self) -> Open {
        let options = |shift, timestamp| Options {
            mss: Some(self.mss),
            window_scale: shift,
            sack_permitted: self.sack,
            timestamp,
        };
        let (own, client) = self.timestamp.unzip();
        Open {
            flow: self.flow,
            client_isn: self.rcv_nxt.wrapping_sub(1),
            active_isn: self.snd_nxt.wrapping_sub(1),
            client_window: self.snd_wnd.min(u16::MAX.into()) as u16,
            client: options(
                self.shifts.map(|(client, _)| client),
                client.map(|t| (t, 0)),
            ),
            active: options(self.shifts.map(|(_, own)| own), own.map(|t| (t, 0))),
        }
    }
}

/// What of a connection is not in its numbers.
pub struct Unfinished {
    /// Goes on where it is.
    pub handler: Box<dyn StreamHandler>,
    /// What it has not taken yet, up to `rcv_nxt`.
    pub input: Vec<u8>,
    /// What the client was told it may send behind that, bytes. A shadow has room for it in the agent's memory, which a
    /// kernel socket has not.
    pub promised: usize,
}

impl std::fmt::Debug for Unfinished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unfinished")
            .field("input", &self.input.len())
            .field("promised", &self.promised)
            .finish_non_exhaustive()
    }
}

/// A connection that is the kernel's from now on, for [`crate::services`].
#[derive(Debug)]
pub struct Adopted {
    /// Its socket, non-blocking.
    pub socket: TcpStream,
    /// The connection.
    pub flow: FlowKey,
    /// Handler and input.
    pub unfinished: Unfinished,
    /// Any change from what was seen here ends it: the epoch in which it was a live shadow is over.
    pub epoch: watch::Receiver<State>,
    /// Held as long as it is open.
    pub entry: OpenFlow,
}

/// A packet that came in for a shadow, as the kernel takes it from a raw socket: without padding, and with a
/// finished checksum. `None` if it contradicts itself.
pub fn for_the_kernel(packet: &[u8]) -> Option<Vec<u8>> {
    let length = usize::from(Ipv4Packet::new_checked(packet).ok()?.total_len());
    let mut packet = packet.get(..length)?.to_vec();
    segment::complete_checksum(&mut packet);
    Some(packet)
}

/// The adopted connections that are open. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct OpenFlows(Arc<Mutex<HashSet<FlowKey>>>);

/// One of them, until dropped.
#[derive(Debug)]
pub struct OpenFlow(OpenFlows, FlowKey);

impl OpenFlows {
    fn lock(&self) -> MutexGuard<'_, HashSet<FlowKey>> {
        // A set of plain keys is whole whoever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes one more.
    pub fn enter(&self, flow: FlowKey) -> OpenFlow {
        self.lock().insert(flow);
        OpenFlow(self.clone(), flow)
    }

    /// Whether this is one of them.
    pub fn contains(&self, flow: &FlowKey) -> bool {
        self.lock().contains(flow)
    }

    /// How many of them are so.
    pub fn count(&self, mut is_so: impl FnMut(FlowKey) -> bool) -> usize {
        self.lock().iter().filter(|flow| is_so(**flow)).count()
    }
}

impl Drop for OpenFlow {
    fn drop(&mut self) {
        let Self(flows, flow) = self;
        flows.lock().remove(flow);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::flow_key;

    #[test]
    fn an_adopted_flow_is_counted_as_long_as_it_is_open() {
        let open = OpenFlows::default();
        let flow = |port| flow_key(Ipv4Addr::LOCALHOST, port, 7);
        let first = open.enter(flow(1));
        let second = open.enter(flow(2));
        assert_eq!(open.count(|_| true), 2);
        assert_eq!(open.count(|known| known == flow(2)), 1);
        assert!(open.contains(&flow(1)));
        drop(first);
        assert!(!open.contains(&flow(1)));
        assert_eq!(open.count(|_| true), 1);
        drop(second);
        assert_eq!(open.count(|_| true), 0);
    }
}
