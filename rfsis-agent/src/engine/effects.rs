//! What the shadow thread does to the kernel for its flows.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Instant;

use rfsis_common::maps::{Direction, FlowKey, State};
use tokio::sync::mpsc::error::TrySendError;

use crate::adopt::{self, Adopted, Numbers, OpenFlows, Unfinished};
use crate::bpf::{Approvals, LiveFlows};
use crate::flows::Effects;
use crate::heartbeat::Nanos;
use crate::metrics::{AdoptionResult, Metrics};
use crate::segment;
use crate::sys::{self, RawIpSocket};
use crate::tcp_repair;
use crate::warm::Warmer;

/// What the shadow thread does to the world: sockets and maps.
#[derive(Debug)]
pub struct KernelEffects {
    /// Sends for live shadows.
    pub socket: RawIpSocket,
    /// Flows whose FIN and RST may leave.
    pub approvals: Approvals,
    /// Flows that live on a shadow.
    pub live_flows: LiveFlows,
    /// Clients whose next hop is to be kept resolved.
    pub warmer: Warmer,
    /// Takes connections that are the kernel's now.
    pub adopted: tokio::sync::mpsc::Sender<Vec<Adopted>>,
    /// Flows that live on a shadow no more. One call of the kernel for many.
    pub released: Vec<FlowKey>,
    /// Those that are to be handed over together: to wake another thread takes as long as to make a socket.
    pub handed_over: Vec<Adopted>,
    /// How long it took to make them, ns, where `adoption_duration` has still to be told.
    pub took: Vec<Nanos>,
    /// Those of them that are open.
    pub open: OpenFlows,
    /// The node's state; what was seen of it last is the epoch of the live shadows.
    pub epoch: tokio::sync::watch::Receiver<State>,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

/// A kernel socket made of a shadow, and since when, ns.
#[derive(Debug)]
pub struct Restored {
    socket: std::net::TcpStream,
    since: Nanos,
}

impl KernelEffects {
    /// Gives the kernel what was released, and then what was adopted to its services.
    ///
    /// Until then frames of those flows come to the shadow thread: it passes on what is for an adopted one, and drops the
    /// rest, as what was in its ring before.
    pub(super) fn settle(&mut self) {
        self.release_all();
        if self.handed_over.is_empty() {
            return;
        }
        match self.adopted.try_reserve() {
            Ok(room) => room.send(std::mem::take(&mut self.handed_over)),
            // With the next ones.
            Err(TrySendError::Full(())) => {}
            // The agent ends: the sockets' FINs meet a closed gate.
            Err(TrySendError::Closed(())) => self.handed_over.clear(),
        }
    }

    fn release_all(&mut self) {
        if self.released.is_empty() {
            return;
        }
        let since = sys::monotonic();
        if let Err(error) = self.live_flows.remove(&self.released) {
            // Frames of those that were adopted are passed on for good.
            tracing::warn!(%error, "cannot release flows");
        }
        let share = sys::monotonic().saturating_sub(since) / self.released.len() as u64;
        for took in self.took.drain(..) {
            let seconds = (took + share) as f64 / 1e9;
            self.metrics.adoption_duration.observe(seconds);
        }
        self.released.clear();
    }

    /// Hands the kernel a packet that came in for a shadow, if that is a kernel socket by now.
    ///
    /// Frames that came later were with the kernel before: where they have ended the connection, the kernel
    /// would answer this one by a reset, and that may hit a client that has not read all.
    pub(super) fn pass_on_if_adopted(&self, packet: &[u8]) -> bool {
        let parsed = segment::parse_headers(packet, Direction::ToVip);
        let is_adopted = parsed.is_ok_and(|(flow, _)| self.open.contains(&flow));
        if is_adopted {
            self.pass_on(packet);
        }
        is_adopted
    }

    /// Hands the kernel a packet that came in while it was not to have it. From a raw socket to an own address
    /// it goes through the loopback device, past the programs.
    pub(super) fn pass_on(&self, packet: &[u8]) {
        let sent = adopt::for_the_kernel(packet).map(|packet| self.socket.send(&packet));
        // As good as lost on its way: the client repeats it.
        if matches!(sent, Some(Err(_))) {
            self.metrics.shadow_send_failures.inc();
        }
    }
}

impl Effects for KernelEffects {
    type Socket = Restored;

    fn may_adopt(&self) -> bool {
        self.handed_over.is_empty()
    }

    fn restore(&mut self, numbers: &Numbers) -> Option<Restored> {
        let since = sys::monotonic();
        match tcp_repair::restore(numbers) {
            Ok(socket) => Some(Restored { socket, since }),
            Err(error) => {
                self.metrics.adoptions.inc(AdoptionResult::Failed);
                tracing::warn!(%error, "the kernel does not adopt a connection: it stays on its shadow");
                None
            }
        }
    }

    fn adopt(&mut self, flow: FlowKey, restored: Restored, unfinished: Unfinished) {
        self.handed_over.push(Adopted {
            socket: restored.socket,
            flow,
            unfinished,
            epoch: self.epoch.clone(),
            entry: self.open.enter(flow),
        });
        self.metrics.adoptions.inc(AdoptionResult::Adopted);
        self.took
            .push(sys::monotonic().saturating_sub(restored.since));
    }

    fn send(&mut self, packet: &[u8]) {
        // Not sent is as good as lost: TCP repeats it.
        if self.socket.send(packet).is_err() {
            self.metrics.shadow_send_failures.inc();
        }
    }

    fn approve(&mut self, flow: FlowKey) {
        if let Err(error) = self.approvals.approve(flow) {
            tracing::warn!(%error, "cannot approve a flow: its FIN is held until it is repeated");
        }
    }

    fn protect(&mut self, flow: FlowKey) -> bool {
        // One that was released a moment ago is not to be removed after this.
        self.release_all();
        self.live_flows.insert(flow).is_ok()
    }

    fn release(&mut self, flow: FlowKey) {
        self.released.push(flow);
    }

    fn warm(&mut self, client: Ipv4Addr) {
        self.warmer.warm(client, Instant::now());
    }
}
