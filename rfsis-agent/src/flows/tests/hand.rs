//! A standby that is shown single segments, written by hand.

use super::*;

/// A standby and segments by hand. Numbers count from each side's initial sequence number.
pub struct Hand {
    pub flows: Flows,
    pub world: World,
    pub flow: FlowKey,
    pub now: Nanos,
    /// What the client announces.
    pub window: u16,
}

pub const CLIENT_ISN: u32 = 0xffff_ff00;
pub const ACTIVE_ISN: u32 = 0x1234_5678;

impl Hand {
    pub fn with(config: FlowsConfig, service: u16) -> Self {
        Self {
            flows: Flows::new(config).unwrap(),
            world: World::default(),
            flow: segment::flow_key(CLIENT, 50_000, service),
            now: SECOND,
            window: 60_000,
        }
    }

    pub fn open(service: u16) -> Self {
        let mut hand = Self::with(config(), service);
        hand.shake();
        assert_eq!(hand.flows.census().lockstep, 1);
        hand
    }

    pub fn shake(&mut self) {
        self.client(0, TcpControl::Syn, b"", None);
        self.active(0, TcpControl::Syn, b"", Some(1));
        self.client(1, TcpControl::None, b"", Some(1));
    }

    pub fn client(
        &mut self,
        at: u32,
        control: TcpControl,
        data: &[u8],
        ack: Option<u32>,
    ) -> FrameResult {
        let repr = TcpRepr {
            seq_number: seq(CLIENT_ISN.wrapping_add(at)),
            ack_number: ack.map(|ack| seq(ACTIVE_ISN.wrapping_add(ack))),
            window_len: self.window,
            payload: data,
            ..bare_repr(self.flow.client_port, self.flow.service_port, control)
        };
        self.show(&by_hand(&repr, Direction::ToVip), Direction::ToVip)
    }

    pub fn active(
        &mut self,
        at: u32,
        control: TcpControl,
        data: &[u8],
        ack: Option<u32>,
    ) -> FrameResult {
        let repr = TcpRepr {
            seq_number: seq(ACTIVE_ISN.wrapping_add(at)),
            ack_number: ack.map(|ack| seq(CLIENT_ISN.wrapping_add(ack))),
            window_len: 60_000,
            payload: data,
            ..bare_repr(self.flow.service_port, self.flow.client_port, control)
        };
        self.show(&by_hand(&repr, Direction::FromVip), Direction::FromVip)
    }

    pub fn show(&mut self, packet: &[u8], direction: Direction) -> FrameResult {
        self.now += MS;
        self.flows
            .process_frame(packet, direction, self.now, &mut self.world)
    }

    /// Time has passed.
    pub fn poll(&mut self, now: Nanos) {
        self.flows.poll(now, &mut self.world);
        self.flows.adopt_some(now, &mut self.world, |_| {});
    }

    /// What the live shadows said: (number, flags and length, acknowledgement), from both ISNs.
    pub fn said(&mut self) -> Vec<(u32, &'static str, usize, u32)> {
        let sent = std::mem::take(&mut self.world.sent);
        let parsed = sent.iter().map(|packet| {
            let (_, s) = segment::parse(packet, Direction::FromVip).unwrap();
            let flag = match (s.syn, s.fin, s.rst) {
                (true, ..) => "SYN",
                (_, true, _) => "FIN",
                (.., true) => "RST",
                _ => "",
            };
            let at = s.seq.wrapping_sub(ACTIVE_ISN);
            (
                at,
                flag,
                s.payload.len(),
                s.ack.map_or(0, |ack| ack.wrapping_sub(CLIENT_ISN)),
            )
        });
        parsed.collect()
    }

    pub fn live(&mut self) -> TakeoverReport {
        self.flows.go_live(self.now, &mut self.world)
    }
}
