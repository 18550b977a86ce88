//! What a flow was promised, and the judge of what a live shadow does.

use super::*;
use crate::flows::Flows;
use crate::sync::{Record, Snapshot};

#[derive(Clone, Debug, Default)]
pub(crate) struct Track {
    pub(crate) client_isn: u32,
    pub(crate) mss: usize,
    pub(crate) sack: bool,
    pub(crate) timestamps: bool,
    pub(crate) scaled: bool,
    pub(crate) shift: u8,
    pub(crate) client_sack: bool,
    /// How far the clock of an adopted connection is ahead of the kernel's own.
    pub(crate) ticks_ahead: u32,
    pub(crate) client_timestamps: bool,
    pub(crate) client_scaled: bool,
    pub(crate) answered: bool,
    pub(crate) ack: Option<u32>,
    pub(crate) edge: Option<u32>,
    pub(crate) tsval: Option<u32>,
    /// What the tap showed of the client, without holes from the start, and behind holes.
    pub(crate) shown: u64,
    pub(crate) behind: BTreeMap<u64, u64>,
    pub(crate) fin: Option<u64>,
    /// Of the active's kernel: its first number, the right edge that it offered last.
    pub(crate) active_isn: u32,
    pub(crate) kernel_edge: u32,
    /// What the client acknowledged to it, the right edge that it offered, and its window shift.
    pub(crate) una: Option<u32>,
    pub(crate) client_edge: u32,
    pub(crate) client_shift: Option<u8>,
    /// The late join that the standby takes part in, and the last snapshot that was taken.
    pub(crate) arriving: Option<u32>,
    pub(crate) offered: Option<Snapshot>,
    /// Its bytes, as they come.
    pub(crate) parts: Vec<u8>,
}

impl Track {
    pub(crate) fn of_syn(segment: &Segment<'_>) -> Self {
        Self {
            client_isn: segment.seq,
            mss: usize::from(segment.options.mss.unwrap_or(536)),
            client_sack: segment.options.sack_permitted,
            client_timestamps: segment.options.timestamp.is_some(),
            client_scaled: segment.options.window_scale.is_some(),
            client_shift: segment.options.window_scale,
            ..Self::default()
        }
    }

    pub(crate) fn active(&mut self, segment: &Segment<'_>) {
        let Some(ack) = segment.ack.filter(|_| !segment.rst) else {
            return;
        };
        self.promise(ack, segment);
    }

    pub(crate) fn promise(&mut self, ack: u32, segment: &Segment<'_>) {
        let shift = if segment.syn { 0 } else { self.shift };
        let edge = ack.wrapping_add(u32::from(segment.window) << shift);
        self.ack = Some(self.ack.map_or(ack, |a| later(a, ack)));
        self.edge = Some(self.edge.map_or(edge, |e| later(e, edge)));
        self.hear(segment);
    }

    /// What the client agreed on and what clock it compares with (RFC 7323 section 5), whether or not
    /// the tap showed it.
    pub(crate) fn hear(&mut self, segment: &Segment<'_>) {
        if segment.syn {
            self.answered = true;
            self.sack = self.client_sack && segment.options.sack_permitted;
            self.timestamps = self.client_timestamps && segment.options.timestamp.is_some();
            self.scaled = self.client_scaled && segment.options.window_scale.is_some();
            self.shift = segment
                .options
                .window_scale
                .filter(|_| self.scaled)
                .unwrap_or(0);
        }
        if let Some((tsval, _)) = segment.options.timestamp {
            self.tsval = Some(self.tsval.map_or(tsval, |t| later(t, tsval)));
        }
    }

    /// Of a connection that the kernel adopts, whose next byte for the handler is `taken`.
    pub(crate) fn adopted(numbers: &Numbers, taken: u32) -> Self {
        let (client_shift, shift) = numbers.shifts.unwrap_or((0, 0));
        Self {
            client_isn: taken.wrapping_sub(1),
            mss: numbers.mss.into(),
            sack: numbers.sack,
            timestamps: numbers.timestamp.is_some(),
            scaled: numbers.shifts.is_some(),
            shift,
            client_shift: Some(client_shift),
            active_isn: numbers.snd_nxt.wrapping_sub(1),
            kernel_edge: numbers.rcv_nxt.wrapping_add(numbers.rcv_wnd),
            una: Some(numbers.snd_nxt),
            client_edge: numbers.snd_nxt.wrapping_add(numbers.snd_wnd),
            ticks_ahead: numbers
                .timestamp
                .map_or(0, |(tsval, _)| tsval.wrapping_sub(active_ticks())),
            ..Self::default()
        }
    }

    /// The active's kernel sends this, whether or not it leaves.
    pub(crate) fn kernel_says(&mut self, segment: &Segment<'_>) {
        if segment.syn {
            self.active_isn = segment.seq;
        }
        if let Some(ack) = segment.ack {
            let shift = if segment.syn { 0 } else { self.shift };
            self.kernel_edge = ack.wrapping_add(u32::from(segment.window) << shift);
        }
    }

    /// This of the client has arrived.
    pub(crate) fn client_says(&mut self, segment: &Segment<'_>) {
        let Some(ack) = segment.ack.filter(|_| !segment.syn && !segment.rst) else {
            return;
        };
        if self.una.is_none_or(|una| !before(ack, una)) {
            let shift = self.client_shift.filter(|_| self.scaled).unwrap_or(0);
            self.una = Some(ack);
            self.client_edge = ack.wrapping_add(u32::from(segment.window) << shift);
        }
    }

    /// The agent has lost all that it held.
    pub(crate) fn forget_all(&mut self) {
        self.forget_shown();
        self.arriving = None;
        self.offered = None;
        self.parts.clear();
    }

    /// The shadow has lost all that it held.
    pub(crate) fn forget_shown(&mut self) {
        self.shown = 0;
        self.behind.clear();
        self.fin = None;
    }

    /// The standby holds what this says, and what the tap showed since.
    pub(crate) fn show_snapshot(&mut self, snapshot: &Snapshot) {
        let end = snapshot.ack.wrapping_sub(u32::from(snapshot.fin));
        let end = u64::from(end.wrapping_sub(self.client_isn.wrapping_add(1)));
        if snapshot.fin {
            self.fin = Some(end);
        }
        self.cover(0, end);
    }

    pub(crate) fn show(&mut self, segment: &Segment<'_>) {
        let start = i64::from(distance(self.client_isn.wrapping_add(1), segment.seq));
        if segment.syn || segment.rst || start < 0 {
            return;
        }
        let end = start as u64 + segment.payload.len() as u64;
        if segment.fin {
            self.fin = Some(end);
        }
        self.cover(start as u64, end);
    }

    fn cover(&mut self, start: u64, end: u64) {
        self.behind
            .entry(start)
            .and_modify(|e| *e = end.max(*e))
            .or_insert(end);
        while let Some(entry) = self.behind.first_entry() {
            if *entry.key() > self.shown {
                break;
            }
            self.shown = self.shown.max(entry.remove());
        }
    }

    /// Everything that a client could hold against a live shadow. `closed`: no client is told of it.
    pub(crate) fn judge(&mut self, segment: &Segment<'_>, raw: &[u8], closed: bool) {
        let brief = Brief(segment);
        // The client looks no further at a segment from before what it has got.
        let probe =
            segment.payload.is_empty() && self.una.is_none_or(|una| before(segment.seq, una));
        if segment.rst || probe {
            return;
        }
        let ack = segment.ack.expect("a segment without ACK");
        let first = self.client_isn.wrapping_add(1);
        let held = self.shown + u64::from(self.fin.is_some_and(|fin| fin <= self.shown));
        hold!(
            NotAhead,
            i64::from(distance(first, ack)) <= held as i64,
            "acknowledges {} bytes of {held}",
            distance(first, ack)
        );
        if let Some(promised) = self.ack {
            hold!(
                Consistent,
                !before(ack, promised),
                "the acknowledgement goes back from {promised}: {brief}"
            );
        }
        let shift = if segment.syn { 0 } else { self.shift };
        let edge = ack.wrapping_add(u32::from(segment.window) << shift);
        if let Some(promised) = self.edge {
            // By a unit, where it is counted in units (RFC 7323 section 2.4): of the kernel, which may have told a
            // snapshot of a lesser one, and of the shadow.
            let slack = if self.shift > 0 { 2 << self.shift } else { 0 };
            hold!(
                Consistent,
                distance(promised, edge) >= -slack,
                "the window shrinks by {}: {brief}",
                distance(edge, promised)
            );
        }
        let options = segment.options;
        if segment.syn {
            hold!(
                Consistent,
                self.client_sack || !options.sack_permitted,
                "SACK that was not offered"
            );
            hold!(
                Consistent,
                self.client_scaled || options.window_scale.is_none(),
                "a window scale that was not offered"
            );
        } else {
            hold!(
                Consistent,
                options.mss.is_none() && options.window_scale.is_none(),
                "options of a SYN"
            );
            let tcp = TcpPacket::new_checked(&raw[20..]).unwrap();
            let blocks = tcp.selective_ack_ranges().unwrap();
            hold!(
                Consistent,
                self.sack || blocks.iter().all(Option::is_none),
                "SACK not negotiated"
            );
            for (left, right) in blocks.into_iter().flatten() {
                let l = u64::from(left.wrapping_sub(first));
                let r = u64::from(right.wrapping_sub(first));
                let acknowledged = u64::from(ack.wrapping_sub(first));
                let behind = || self.behind.iter().any(|(start, _)| *start <= l);
                hold!(
                    NotAhead,
                    acknowledged < l && l < r && (r <= self.shown || behind()),
                    "SACK of {l}..{r}, {acknowledged} acknowledged, {} shown",
                    self.shown
                );
            }
        }
        hold!(
            Consistent,
            options.timestamp.is_some() == self.timestamps,
            "timestamps as negotiated"
        );
        if let (Some((tsval, _)), Some(last)) = (options.timestamp, self.tsval) {
            hold!(
                Consistent,
                !before(tsval, last),
                "the timestamp steps back from {last} to {tsval}"
            );
        }
        let room = self.mss - if self.timestamps { 12 } else { 0 };
        hold!(
            Consistent,
            segment.payload.len() <= room,
            "{} bytes of data",
            segment.payload.len()
        );
        if !closed {
            self.promise(ack, segment);
        }
    }

    /// Everything that a client could hold against a kernel socket with these numbers.
    fn judge_numbers(&self, numbers: &Numbers) {
        let first = self.client_isn.wrapping_add(1);
        let taken = u64::from(numbers.rcv_nxt.wrapping_sub(first));
        hold!(
            NotAhead,
            taken <= self.shown,
            "adopted with {taken} bytes of {}",
            self.shown
        );
        let promised = self.ack.unwrap_or(numbers.rcv_nxt);
        hold!(
            Consistent,
            !before(numbers.rcv_nxt, promised),
            "adopted with less than was acknowledged"
        );
        let edge = numbers.rcv_nxt.wrapping_add(numbers.rcv_wnd);
        hold!(
            Consistent,
            !before(edge, self.edge.unwrap_or(edge)),
            "the window shrinks when adopted"
        );
        let shift = numbers.shifts.map(|(_, own)| own);
        let agreed = (
            self.sack,
            self.scaled.then_some(self.shift),
            self.timestamps,
        );
        let adopted = (numbers.sack, shift, numbers.timestamp.is_some());
        hold!(
            Consistent,
            adopted == agreed,
            "adopted with {adopted:?}, agreed on {agreed:?}"
        );
        if let (Some((tsval, _)), Some(last)) = (numbers.timestamp, self.tsval) {
            hold!(
                Consistent,
                !before(tsval, last),
                "the timestamp steps back when adopted"
            );
        }
    }
}

/// The world that the flows act on.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// Whether the gate drops what is sent.
    pub(crate) closed: bool,
    pub(crate) live: HashSet<FlowKey>,
    pub(crate) approved: HashSet<FlowKey>,
    pub(crate) sent: Vec<Vec<u8>>,
    pub(crate) sent_count: usize,
    pub(crate) resets: Vec<FlowKey>,
    pub(crate) warmed: usize,
    pub(crate) live_limit: Option<usize>,
    /// Whether the kernel takes live flows, and what it took.
    pub(crate) adopts: bool,
    pub(crate) refusals: usize,
    pub(crate) adopted: Vec<(Numbers, Unfinished)>,
    pub(crate) tracks: HashMap<FlowKey, Track>,
}

impl World {
    /// Nothing of the agent's is left.
    pub(crate) fn clear(&mut self) {
        self.live.clear();
        self.approved.clear();
        self.sent.clear();
        self.adopted.clear();
    }

    /// The shadows are shown a frame.
    pub(crate) fn show(&mut self, packet: &[u8], direction: Direction) {
        if let Ok((flow, segment)) = parse(packet, direction)
            && let Some(track) = self.tracks.get_mut(&flow)
        {
            match direction {
                Direction::ToVip => track.show(&segment),
                Direction::FromVip => track.active(&segment),
            }
        }
    }

    /// The peer says this, and the shadows have not heard it yet.
    pub(crate) fn note_record(&mut self, record: &Record) {
        match record {
            Record::Offer(offer) => {
                if let Some(track) = self.tracks.get_mut(&offer.flow)
                    && track.arriving.replace(offer.join) != Some(offer.join)
                {
                    // For the judge: it begins anew.
                    track.forget_shown();
                    track.parts.clear();
                }
            }
            Record::Part(part) => {
                if let Some(track) = self.tracks.get_mut(&part.flow) {
                    if track.parts.len() == part.offset as usize {
                        track.parts.extend_from_slice(&part.bytes);
                    }
                    let whole = track.parts.len() == part.total as usize;
                    track.offered = Snapshot::parse(&track.parts).ok().filter(|_| whole);
                }
            }
            _ => {}
        }
    }

    /// Shadows that were made of a snapshot hold what it says.
    pub(crate) fn note_restored(&mut self, flows: &Flows) {
        for (flow, track) in &mut self.tracks {
            if let Some(snapshot) = &track.offered
                && flows.client_isn(*flow) == Some(snapshot.client_isn())
                && let Some(snapshot) = track.offered.take()
            {
                track.show_snapshot(&snapshot);
            }
        }
    }
}

impl Effects for World {
    type Socket = Numbers;

    fn may_adopt(&self) -> bool {
        true
    }

    fn restore(&mut self, numbers: &Numbers) -> Option<Numbers> {
        if let Some(track) = self.tracks.get(&numbers.flow) {
            track.judge_numbers(numbers);
        }
        self.refusals += usize::from(!self.adopts);
        self.adopts.then_some(*numbers)
    }

    fn adopt(&mut self, flow: FlowKey, numbers: Numbers, unfinished: Unfinished) {
        hold!(
            Consistent,
            !self.live.contains(&flow),
            "its frames go to nobody"
        );
        self.adopted.push((numbers, unfinished));
    }

    fn send(&mut self, packet: &[u8]) {
        let (flow, segment) = parse(packet, Direction::FromVip).expect("a sound packet");
        let long = packet.len();
        hold!(Consistent, long <= MTU, "{long} bytes on the wire");
        hold!(
            Approved,
            !(segment.fin || segment.rst) || self.approved.contains(&flow),
            "FIN or RST without approval"
        );
        if segment.rst {
            self.resets.push(flow);
        }
        if segment.syn {
            self.approved.remove(&flow);
        }
        let closed = self.closed;
        if let Some(track) = self.tracks.get_mut(&flow).filter(|track| track.answered) {
            track.judge(&segment, packet, closed);
        }
        self.sent_count += 1;
        self.sent.push(packet.to_vec());
    }

    fn approve(&mut self, flow: FlowKey) {
        self.approved.insert(flow);
    }

    fn protect(&mut self, flow: FlowKey) -> bool {
        let full = self
            .live_limit
            .is_some_and(|limit| self.live.len() >= limit);
        if full && !self.live.contains(&flow) {
            return false;
        }
        self.live.insert(flow);
        true
    }

    fn release(&mut self, flow: FlowKey) {
        self.live.remove(&flow);
    }

    fn warm(&mut self, _: Ipv4Addr) {
        self.warmed += 1;
    }
}
