//! A live shadow becomes an ordinary kernel socket: which numbers it takes, and how the kernel is told.
//!
//! The core decides when ([`crate::flows`], [`crate::shadow`]): nothing that was sent is unacknowledged, and
//! the client has said so. So there are no queues to restore, and the numbers are exact. Here is the edge: a
//! socket made from [`Numbers`] by TCP_REPAIR (tcp(7), `do_tcp_setsockopt` in net/ipv4/tcp.c), and frames
//! that came in for the shadow when the flow was the kernel's already.

use std::collections::HashSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rfsis_common::maps::{FlowKey, State};
use smoltcp::wire::Ipv4Packet;
use socket2::{Domain, Socket, Type};
use tokio::sync::watch;

use crate::handler::StreamHandler;
use crate::segment;
use crate::services::SOCKET_BUFFER;
use crate::sys::set_tcp_option;

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
    /// Not before any timestamp that the client was sent, if both announced them; 1 ms a tick.
    pub tsval: Option<u32>,
}

/// What of a connection is not in its numbers.
pub struct Unfinished {
    /// Goes on where it is.
    pub handler: Box<dyn StreamHandler>,
    /// What it has not taken yet, up to `rcv_nxt`.
    pub input: Vec<u8>,
}

impl std::fmt::Debug for Unfinished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unfinished")
            .field("input", &self.input.len())
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

/// Values of `TCP_REPAIR`, and the queues of `TCP_REPAIR_QUEUE` (include/uapi/linux/tcp.h). Off without a
/// window probe: the client has just said what its window is.
const REPAIR_ON: u32 = 1;
const REPAIR_OFF_NO_WP: u32 = -1_i32 as u32;
const RECV_QUEUE: u32 = 1;
const SEND_QUEUE: u32 = 2;

/// Option kinds for `TCP_REPAIR_OPTIONS` (RFC 9293 section 3.1, RFC 7323, RFC 2018).
const KIND_MSS: u32 = 2;
const KIND_WINDOW: u32 = 3;
const KIND_SACK: u32 = 4;
const KIND_TIMESTAMP: u32 = 8;

/// The kernel takes a segment size from here on (`TCP_MIN_MSS`, net/ipv4/tcp.c) up to its largest window.
const MSS_RANGE: (u32, u32) = (88, 32_767);

/// Makes a connected socket from numbers. Sends nothing, and if it fails leaves nothing behind.
///
/// # Errors
/// The system's: EPERM without CAP_NET_ADMIN, EADDRNOTAVAIL if the kernel has such a connection already.
pub fn restore(numbers: &Numbers) -> io::Result<TcpStream> {
    let Numbers { flow, vip, .. } = *numbers;
    let service = SocketAddrV4::new(vip, flow.service_port);
    let client = SocketAddrV4::new(Ipv4Addr::from(flow.client_addr), flow.client_port);
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.set_tcp_nodelay(true)?;
    // Else the segment size stays what it is before a handshake: `tcp_connect_init` sets it, from this, and
    // TCP_REPAIR_OPTIONS only what it may become.
    let mss = u32::from(numbers.mss).clamp(MSS_RANGE.0, MSS_RANGE.1);
    socket.set_tcp_mss(mss)?;
    let set = |option, words: &[u32]| set_tcp_option(&socket, option, words);
    // From here on closing the socket says nothing to anybody.
    set(libc::TCP_REPAIR, &[REPAIR_ON])?;
    set(libc::TCP_REPAIR_QUEUE, &[SEND_QUEUE])?;
    set(libc::TCP_QUEUE_SEQ, &[numbers.snd_nxt])?;
    set(libc::TCP_REPAIR_QUEUE, &[RECV_QUEUE])?;
    set(libc::TCP_QUEUE_SEQ, &[numbers.rcv_nxt])?;
    // Repair binds beside the listener; SO_REUSEADDR would end that.
    socket.bind(&service.into())?;
    socket.connect(&client.into())?;
    let (client_shift, own_shift) = numbers.shifts.unwrap_or((0, 0));
    let shifts = u32::from(client_shift) | u32::from(own_shift) << 16;
    let mut options = vec![KIND_MSS, mss, KIND_WINDOW, shifts];
    if numbers.sack {
        options.extend([KIND_SACK, 0]);
    }
    if numbers.tsval.is_some() {
        options.extend([KIND_TIMESTAMP, 0]);
    }
    set(libc::TCP_REPAIR_OPTIONS, &options)?;
    if let Some(tsval) = numbers.tsval {
        // An odd one would make the clock tick in microseconds.
        set(libc::TCP_TIMESTAMP, &[tsval.wrapping_add(tsval & 1)])?;
    }
    let snd_wl1 = numbers.rcv_nxt;
    let (snd_wnd, rcv_wnd) = (numbers.snd_wnd, numbers.rcv_wnd);
    let rcv_wup = numbers.rcv_nxt;
    let window = [snd_wl1, snd_wnd, snd_wnd, rcv_wnd, rcv_wup];
    set(libc::TCP_REPAIR_WINDOW, &window)?;
    set(libc::TCP_REPAIR, &[REPAIR_OFF_NO_WP])?;
    // As an accepted socket has it from its listener: else the next agent could not listen on this port.
    socket.set_reuse_address(true)?;
    Ok(socket.into())
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
        drop(first);
        assert_eq!(open.count(|_| true), 1);
        drop(second);
        assert_eq!(open.count(|_| true), 0);
    }
}
