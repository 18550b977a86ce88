//! A node whose ACK gate guards one flow.

use std::time::Duration;

use rfsis_agent::bpf::{Counters, GuardMaps, Program, Programs, SkbContext};
use rfsis_common::ack_gate::{AckGateVerdict, Confirmation, Guarded, Sent};
use rfsis_common::maps::State;

use crate::frames::FLOW;
use crate::host::set_state;
use crate::segments::{FIRST, FIRST_EDGE, NEXT, SHIFT, SLOT};

/// Nothing comes within this time: it was not sent.
pub const QUIET: Duration = Duration::from_millis(60);

pub const UNSPEC: i32 = -1;
pub const STOLEN: i32 = 4;

/// An active node with one flow that the standby knows.
pub struct Gate {
    pub programs: Programs,
    pub maps: GuardMaps,
    pub counters: Counters,
}

impl Gate {
    pub fn new(programs: Programs) -> Self {
        set_state(&programs, State::Active, u64::MAX);
        let maps = programs.guard_maps().unwrap();
        maps.set_mode(true).unwrap();
        Self {
            counters: programs.counters().unwrap(),
            maps,
            programs,
        }
    }

    /// The flow as it is behind its handshake.
    pub fn open_flow(&self, confirmation: Confirmation) {
        let sent = Sent::new(FIRST - 1, NEXT - 1, (FIRST_EDGE - FIRST) as u16);
        self.maps.reset(SLOT, sent).unwrap();
        assert!(self.maps.confirm(SLOT, confirmation));
        let guarded = Guarded {
            slot: SLOT,
            client_isn: FIRST - 1,
            shift: SHIFT,
        };
        self.maps.publish(FLOW, guarded).unwrap();
    }

    /// Code, frame that leaves, and the verdicts that were counted meanwhile.
    pub fn run(&mut self, frame: &[u8], mark: u32) -> (i32, Vec<u8>, Vec<AckGateVerdict>) {
        let context = SkbContext { mark, ifindex: 0 };
        let before = self.counters.ack_gate().unwrap();
        let (code, output) = self
            .programs
            .test_run(Program::Gate, frame, context)
            .unwrap();
        let after = self.counters.ack_gate().unwrap();
        let moved = |verdict| after.get(verdict) - before.get(verdict);
        let verdicts = AckGateVerdict::ALL
            .into_iter()
            .flat_map(|verdict| (0..moved(verdict)).map(move |_| verdict));
        (code, output, verdicts.collect())
    }

    /// That a frame leaves as `expected`, or not at all.
    pub fn expect(
        &mut self,
        name: &str,
        frame: &[u8],
        mark: u32,
        verdict: AckGateVerdict,
        expected: Option<&[u8]>,
    ) {
        let (code, output, verdicts) = self.run(frame, mark);
        assert_eq!(verdicts, [verdict], "{name}");
        let Some(expected) = expected else {
            assert_eq!(code, STOLEN, "{name}");
            return;
        };
        assert_eq!(code, UNSPEC, "{name}");
        assert_eq!(output, expected, "{name}");
    }

    pub fn sent(&self) -> Sent {
        self.maps.sent(SLOT).unwrap()
    }
}
