//! When a live shadow repeats what nobody acknowledged, before smoltcp would.
//!
//! smoltcp waits a second at least. The packets that are lost at a takeover are the first ones, and a
//! client that waits for an answer says nothing that would hurry it. As in a tail loss probe (RFC 8985
//! section 7) the oldest segment is repeated after two round trips, which the standby has measured on
//! the active's traffic; each further repetition waits twice as long, and then the timeout is left to
//! its own.

use crate::heartbeat::Nanos;
use crate::lockstep::{before, later};

const MILLISECOND: Nanos = 1_000_000;

/// Shortest time until the first repetition, also where no round trip was measured yet.
const SHORTEST: Nanos = 20 * MILLISECOND;

/// Longest time until the first repetition: smoltcp's own timeout is shorter.
const LONGEST: Nanos = 500 * MILLISECOND;

/// Repetitions in a row; 20 ms · (2⁵ - 1) is close to smoltcp's second.
const MOST: u32 = 5;

/// The probe of one flow. Sequence numbers are those of the server's stream, in wire units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TailProbe {
    /// Smoothed round trip (RFC 6298 section 2), 0 until one was measured.
    round_trip: Nanos,
    /// End of a segment that is being timed, and when it was sent.
    timed: Option<(u32, Nanos)>,
    /// Since when something is outstanding, or was last acknowledged in part; and up to where.
    outstanding: Option<(Nanos, u32)>,
    made: u32,
}

impl TailProbe {
    /// Smoothed round trip, ns; 0 until one was measured.
    pub fn round_trip(&self) -> Nanos {
        self.round_trip
    }

    /// Data up to `end` was sent, by the active or by this shadow.
    pub fn sent(&mut self, end: u32, now: Nanos) {
        self.timed.get_or_insert((end, now));
        let (since, known) = *self.outstanding.get_or_insert((now, end));
        self.outstanding = Some((since, later(known, end)));
    }

    /// The client has acknowledged everything before `una`, for the first time.
    pub fn acknowledged(&mut self, una: u32, now: Nanos) {
        if let Some((end, at)) = self.timed
            && !before(una, end)
        {
            self.timed = None;
            let sample = now.saturating_sub(at);
            self.round_trip = match self.round_trip {
                0 => sample,
                smoothed => (7 * smoothed + sample) / 8,
            };
        }
        self.made = 0;
        self.outstanding = self
            .outstanding
            .filter(|(_, end)| before(una, *end))
            .map(|(_, end)| (now, end));
    }

    /// Forgets what is under way, keeps the round trip: another node sends from now on.
    pub fn restart(&mut self) {
        *self = Self {
            round_trip: self.round_trip,
            ..Self::default()
        };
    }

    /// When the oldest segment is to be repeated, ns; `None` if nothing is outstanding, or it was
    /// repeated often enough.
    pub fn due_at(&self) -> Option<Nanos> {
        let (since, _) = self.outstanding?;
        let patience = (2 * self.round_trip).clamp(SHORTEST, LONGEST);
        (self.made < MOST).then(|| since + (patience << (self.made + 1)) - patience)
    }

    /// It was repeated. What is timed now would be ambiguous (RFC 6298 section 3).
    pub fn repeated(&mut self) {
        self.made += 1;
        self.timed = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_client_is_reminded_ever_more_rarely_and_then_left_alone() {
        let mut probe = TailProbe::default();
        assert_eq!(probe.due_at(), None);
        probe.sent(100, 0);
        let mut at = Vec::new();
        while let Some(due) = probe.due_at() {
            at.push(due / MILLISECOND);
            probe.repeated();
        }
        assert_eq!(at, [20, 60, 140, 300, 620]);
    }

    #[test]
    fn patience_follows_the_round_trip_measured() {
        let mut probe = TailProbe::default();
        for i in 0..50 {
            let now = i * 1000 * MILLISECOND;
            probe.sent(i as u32 + 1, now);
            probe.acknowledged(i as u32 + 1, now + 80 * MILLISECOND);
            assert_eq!(probe.due_at(), None);
        }
        probe.restart();
        probe.sent(60, 0);
        assert_eq!(probe.due_at(), Some(160 * MILLISECOND));
        // What was repeated is not measured.
        probe.repeated();
        probe.acknowledged(60, 10_000 * MILLISECOND);
        probe.sent(61, 0);
        assert_eq!(probe.due_at(), Some(160 * MILLISECOND));
    }

    #[test]
    fn progress_starts_the_wait_anew_for_the_rest() {
        let mut probe = TailProbe::default();
        probe.sent(100, 0);
        probe.sent(200, 5 * MILLISECOND);
        probe.repeated();
        probe.acknowledged(100, 30 * MILLISECOND);
        assert_eq!(probe.due_at(), Some(50 * MILLISECOND));
        probe.acknowledged(200, 40 * MILLISECOND);
        assert_eq!(probe.due_at(), None);
    }
}
