//! What the guard does to the world.

use rfsis_common::ack_gate::{Confirmation, Guarded, Sent};
use rfsis_common::agree::Pending;
use rfsis_common::maps::FlowKey;
use rfsis_common::prompt::Delegated;

use crate::heartbeat::Nanos;

/// Maps of the ACK gate, a socket past it, and the services.
pub trait GuardEffects {
    /// Opens or closes the gate for what the standby has not confirmed.
    fn set_guarding(&mut self, on: bool);
    /// Starts a slot anew. Before the flow that gets it is published.
    fn start(&mut self, slot: u32, sent: Sent) -> bool;
    /// Tells the gate of a flow; false if there is no room.
    fn publish(&mut self, flow: FlowKey, guarded: Guarded) -> bool;
    /// Takes a flow from the gate.
    fn withdraw(&mut self, flow: FlowKey);
    /// Gives the gate a slot for a flow on which the kernels agree by themselves; false if it takes no more.
    fn lend(&mut self, slot: u32) -> bool;
    /// The SYN-ACK of this flow that the gate keeps, if it does.
    fn kept(&mut self, flow: FlowKey) -> Option<Pending>;
    /// Takes a held SYN-ACK from the gate, which would let it go when the kernels agree; false if it has done so.
    fn claim(&mut self, flow: FlowKey) -> bool;
    /// Writes what the standby holds, whatever stood there.
    fn confirm(&mut self, slot: u32, confirmation: Confirmation) -> bool;
    /// Adds what the standby holds to what the gate has taken by itself; gives all.
    fn confirm_more(&mut self, slot: u32, confirmation: Confirmation) -> Confirmation;
    /// What was written, and what the gate has taken by itself since.
    fn confirmed(&mut self, slot: u32) -> Confirmation;
    /// Lets the gate take confirmations of a flow by itself from now on, or no longer, by a value of zeros.
    fn delegate(&mut self, slot: u32, delegated: Delegated) -> bool;
    /// When it has last taken one, of whichever flow, ns.
    fn prompted_at(&mut self) -> Nanos;
    /// Reads what was sent; `None` while it is being written.
    fn sent(&mut self, slot: u32) -> Option<Sent>;
    /// Sends an IPv4 packet past the ACK gate.
    fn send(&mut self, packet: &[u8]);
    /// Whether a service has this connection: its client has completed the handshake.
    fn runs(&mut self, flow: FlowKey) -> bool;
    /// Asks for a snapshot of a running connection, for [`Guard::process_snapshot`](super::Guard::process_snapshot).
    fn take_snapshot(&mut self, flow: FlowKey, join: u32);
}
