//! What a judge may ask of the flows.

use rfsis_common::maps::FlowKey;

use super::{Flow, Flows, is_exposed};
use crate::metrics::FlowCondition;
use crate::shadow::Shadow;

impl Flows {
    fn shadow(&self, flow: FlowKey) -> Option<&Shadow> {
        match self.flows.get(&flow)? {
            Flow::Shadow(shadow) => Some(shadow),
            Flow::Unprotected { .. } => None,
        }
    }

    /// By which number of the client the nodes tell this flow's connection from others.
    pub(crate) fn client_isn(&self, flow: FlowKey) -> Option<u32> {
        self.shadow(flow)
            .map(|shadow| shadow.handshake().client_isn)
    }

    /// How the flow is counted; `None` without a shadow.
    pub(crate) fn condition(&self, flow: FlowKey) -> Option<FlowCondition> {
        let shadow = self.shadow(flow)?;
        Some(if !self.live && is_exposed(&self.config, shadow) {
            FlowCondition::Unprotected
        } else {
            shadow.condition()
        })
    }

    /// Up to which sequence number the active may let the client send.
    pub(crate) fn confirmed_edge(&self, flow: FlowKey) -> Option<u32> {
        self.shadow(flow).map(Shadow::confirmed_edge)
    }

    /// Whether anything is known of the flow.
    pub(crate) fn knows(&self, flow: FlowKey) -> bool {
        self.flows.contains_key(&flow) || self.openings.contains_key(&flow)
    }
}
