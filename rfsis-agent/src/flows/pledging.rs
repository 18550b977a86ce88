//! What pledges ([`crate::pledge`]) ask of the flows.

use rfsis_common::maps::FlowKey;

use super::{Effects, Flow, Flows};
use crate::shadow::Shadow;
use crate::sync::Record;

impl Flows {
    /// Bytes that all shadows may still store.
    pub fn room(&self) -> usize {
        self.config.max_bytes.saturating_sub(self.bytes)
    }

    /// The shadow of a connection that the active guards, while this node is standby.
    pub fn pledging(&mut self, flow: FlowKey, client_isn: u32) -> Option<&mut Shadow> {
        match self.flows.get_mut(&flow) {
            Some(Flow::Shadow(shadow)) if !self.live && !shadow.is_closed() => {
                let handshake = shadow.handshake();
                (handshake.guarded && handshake.client_isn == client_isn).then_some(shadow)
            }
            _ => None,
        }
    }

    /// The shadow lacks what was confirmed for it: the active is to hear that the flow is not protected.
    pub fn refuse(&mut self, flow: FlowKey, fx: &mut impl Effects) {
        let Some(Flow::Shadow(shadow)) = self.flows.get(&flow) else {
            return;
        };
        let client_isn = shadow.handshake().client_isn;
        self.drop_bytes_of(flow);
        self.flows.remove(&flow);
        fx.release(flow);
        self.leave_unprotected(flow, None, self.clock);
        self.tells.push(Record::Refuse { flow, client_isn });
    }
}
