//! Which heartbeats are *fresh*: a valid MAC says who wrote a heartbeat, not when.
//!
//! An attacker on the LAN can record authentic heartbeats and send them again. So the peer counts
//! as heard only by a heartbeat that cannot have been recorded before:
//!
//! - within the *established* session its sequence must grow;
//! - a new session becomes established only with a heartbeat that echoes *our* session and one of
//!   the last few sequences that we sent: its sender has heard us moments ago. Our session is
//!   random, so nothing recorded before our start can do that;
//! - and that sequence must be beyond all that were echoed to us before: whoever echoes more of us
//!   lived longer. So an ended session, which stopped listening before the present one proved
//!   itself, cannot come back, neither by replay nor by a heartbeat that was late on the wire.
//!
//! What we echo is the other half. While a session is established, it and nothing else is echoed,
//! so a replay cannot take its place: a peer that restarted needs no echo to be proven here, it
//! hears us, echoes us and is established. Only a node that has nobody established (it has just
//! started) echoes the unproven, each in turn, and only while their sequences grow; so a recording
//! counts at most once, and a genuine peer among up to [`CANDIDATES`] sessions gets its turn. Of
//! two nodes that see each other at least one is then always proven by the other's echo.
//!
//! Not covered: an attacker who cuts the peer off from us *and* delays its heartbeats.

use std::net::Ipv4Addr;

use super::{Echo, Heartbeat, Nanos};

/// Unproven sessions that are remembered at once.
pub const CANDIDATES: usize = 16;

/// An echo is recent within this time, or within [`MIN_WINDOW`] heartbeats.
const WINDOW_NS: Nanos = 2_000_000_000;
const MIN_WINDOW: u64 = 8;

/// A heartbeat that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// The next of the established session.
    Fresh,
    /// The first of a session that is established with it.
    NewSession,
}

/// A heartbeat that does not count, although its MAC is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Its sender has our node id.
    #[error(
        "another host uses our node address {0}: give each node its own, and check `nodes` in the config of both"
    )]
    OwnId(Ipv4Addr),
    /// Its sender is none of the two nodes.
    #[error(
        "heartbeat of the unknown node {0}: is a third host configured with this cluster's name and key?"
    )]
    UnknownNode(Ipv4Addr),
    /// Its sequence is not beyond the last one of its session: a duplicate or a replay.
    #[error("heartbeat seen before, or older than one seen before")]
    Stale,
    /// A session that has not (or no longer) shown that it hears us: new, or a replay.
    #[error("heartbeat of a session that has not echoed our latest")]
    Unproven,
}

impl Refusal {
    /// Value of the metrics label `result`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Refusal::OwnId(_) => "own_id",
            Refusal::UnknownNode(_) => "unknown_node",
            Refusal::Stale => "stale",
            Refusal::Unproven => "unproven",
        }
    }
}

/// A session and the highest sequence seen of it.
#[derive(Clone, Copy, Debug)]
struct Progress {
    session: u64,
    sequence: u64,
}

/// A session that may be the peer's new one, or a recording.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    seen: Progress,
    /// Grew since it was last echoed.
    due: bool,
    /// [`PeerSession::turn`] when it last grew or was echoed: lowest goes first.
    turn: u64,
}

/// Our session, and what is known of the peer's.
#[derive(Debug)]
pub struct PeerSession {
    node: Ipv4Addr,
    peer: Ipv4Addr,
    own: Progress,
    window: u64,
    established: Option<Progress>,
    candidates: Vec<Candidate>,
    turn: u64,
    /// Highest sequence of ours that a heartbeat which counted has echoed.
    proven_echo: u64,
}

impl PeerSession {
    /// `session` is ours: random, not 0. `interval` is that of the heartbeats, ns.
    pub fn new(node: Ipv4Addr, peer: Ipv4Addr, session: u64, interval: Nanos) -> Self {
        Self {
            node,
            peer,
            own: Progress {
                session,
                sequence: 0,
            },
            window: MIN_WINDOW.max(WINDOW_NS / interval.max(1)),
            established: None,
            candidates: Vec::with_capacity(CANDIDATES),
            turn: 0,
            proven_echo: 0,
        }
    }

    /// Whether the peer was ever proven.
    pub fn is_established(&self) -> bool {
        self.established.is_some()
    }

    /// The peer's session, once it is proven.
    pub fn peer_session(&self) -> Option<u64> {
        self.established.map(|established| established.session)
    }

    /// Sequence of the last heartbeat that [`stamp`](Self::stamp) numbered, 0 before the first.
    pub fn own_sequence(&self) -> u64 {
        self.own.sequence
    }

    /// Whether `echo` is of our session, from sequence `first` on.
    pub fn echoes_since(&self, echo: Option<Echo>, first: u64) -> bool {
        echo.is_some_and(|echo| {
            echo.session == self.own.session && (first..=self.own.sequence).contains(&echo.sequence)
        })
    }

    /// Session, sequence and echo of our next heartbeat.
    pub fn stamp(&mut self) -> (u64, u64, Option<Echo>) {
        self.own.sequence += 1;
        (self.own.session, self.own.sequence, self.next_echo())
    }

    /// Judges a heartbeat whose MAC is valid.
    pub fn judge(&mut self, heartbeat: &Heartbeat) -> Result<Freshness, Refusal> {
        if heartbeat.node == self.node {
            return Err(Refusal::OwnId(self.node));
        }
        if heartbeat.node != self.peer {
            return Err(Refusal::UnknownNode(heartbeat.node));
        }
        let seen = Progress {
            session: heartbeat.session,
            sequence: heartbeat.sequence,
        };
        if let Some(established) = &mut self.established
            && established.session == seen.session
        {
            if seen.sequence <= established.sequence {
                return Err(Refusal::Stale);
            }
            established.sequence = seen.sequence;
            self.note_echo(heartbeat.echo);
            return Ok(Freshness::Fresh);
        }
        self.note_candidate(seen)?;
        let recent = self.own.sequence.saturating_sub(self.window);
        let oldest = recent.max(self.proven_echo + 1);
        if !self.echoes_since(heartbeat.echo, oldest) {
            return Err(Refusal::Unproven);
        }
        self.established = Some(seen);
        self.candidates.clear();
        self.note_echo(heartbeat.echo);
        Ok(Freshness::NewSession)
    }

    /// Stale where the candidate does not grow: a duplicate proves nothing and is not echoed again.
    fn note_candidate(&mut self, seen: Progress) -> Result<(), Refusal> {
        self.turn += 1;
        let turn = self.turn;
        if let Some(known) = self
            .candidates
            .iter_mut()
            .find(|c| c.seen.session == seen.session)
        {
            if seen.sequence <= known.seen.sequence {
                return Err(Refusal::Stale);
            }
            known.seen = seen;
            if !known.due {
                known.due = true;
                known.turn = turn;
            }
            return Ok(());
        }
        if self.candidates.len() == CANDIDATES {
            // One that had its echo and did not grow since, else the one that has waited longest.
            let oldest =
                (0..CANDIDATES).min_by_key(|&i| (self.candidates[i].due, self.candidates[i].turn));
            if let Some(oldest) = oldest {
                self.candidates.swap_remove(oldest);
            }
        }
        self.candidates.push(Candidate {
            seen,
            due: true,
            turn,
        });
        Ok(())
    }

    fn note_echo(&mut self, echo: Option<Echo>) {
        if let Some(echo) = echo
            && self.echoes_since(Some(echo), self.proven_echo)
        {
            self.proven_echo = echo.sequence;
        }
    }

    fn next_echo(&mut self) -> Option<Echo> {
        let seen = match self.established {
            Some(established) => established,
            None => {
                self.turn += 1;
                let candidate = self
                    .candidates
                    .iter_mut()
                    .filter(|c| c.due)
                    .min_by_key(|c| c.turn)?;
                candidate.due = false;
                candidate.turn = self.turn;
                candidate.seen
            }
        };
        Some(Echo {
            session: seen.session,
            sequence: seen.sequence,
        })
    }
}

#[cfg(test)]
mod tests {
    use rfsis_common::maps::State;

    use super::*;
    use crate::cli::Role;
    use crate::heartbeat::wish::Wish;

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const INTERVAL: Nanos = 10_000_000;

    /// A with session `session`, and its peer B likewise.
    fn a(session: u64) -> PeerSession {
        PeerSession::new(A, B, session, INTERVAL)
    }

    fn b(session: u64) -> PeerSession {
        PeerSession::new(B, A, session, INTERVAL)
    }

    fn beat(from: &mut PeerSession) -> Heartbeat {
        let (session, sequence, echo) = from.stamp();
        Heartbeat {
            state: State::Active,
            role: Role::Primary,
            node: from.node,
            mac: [2; 6],
            tap_mac: [2; 6],
            epoch: 1,
            session,
            sequence,
            sent_ns: 0,
            echo,
            wish: Wish::None,
            objection: None,
            at_risk: 0,
        }
    }

    /// Both send once an interval, until each has established the other; how many intervals.
    fn intervals_until_proven(a: &mut PeerSession, b: &mut PeerSession) -> usize {
        let (a_session, b_session) = (a.own.session, b.own.session);
        let knows =
            |of: &PeerSession, session| of.established.is_some_and(|e| e.session == session);
        for interval in 0..100 {
            if knows(a, b_session) && knows(b, a_session) {
                return interval;
            }
            let _ = b.judge(&beat(a));
            let _ = a.judge(&beat(b));
        }
        panic!("never proven: {a:?} {b:?}");
    }

    #[test]
    fn two_nodes_that_start_together_prove_each_other_in_two_intervals() {
        assert!(intervals_until_proven(&mut a(1), &mut b(2)) <= 2);
    }

    #[test]
    fn a_restarted_node_is_proven_in_two_intervals_whichever_it_is() {
        let (mut first, mut second) = (a(1), b(2));
        intervals_until_proven(&mut first, &mut second);
        assert!(intervals_until_proven(&mut first, &mut b(3)) <= 2);
        assert!(intervals_until_proven(&mut a(4), &mut second) <= 2);
    }

    #[test]
    fn replay_of_the_last_heartbeats_of_a_dead_peer_is_stale() {
        let (mut alive, mut dead) = (a(1), b(2));
        intervals_until_proven(&mut alive, &mut dead);
        let recorded: Vec<_> = (0..50).map(|_| beat(&mut dead)).collect();
        for heartbeat in &recorded {
            assert_eq!(alive.judge(heartbeat), Ok(Freshness::Fresh));
        }
        for heartbeat in recorded.iter().cycle().take(5_000) {
            assert_eq!(alive.judge(heartbeat), Err(Refusal::Stale));
        }
    }

    #[test]
    fn an_ended_session_does_not_come_back_although_it_echoes_ours() {
        let (mut alive, mut old) = (a(1), b(2));
        intervals_until_proven(&mut alive, &mut old);
        let _ = old.judge(&beat(&mut alive));
        // Recorded, or late on the wire: its sequence is new and its echo is the latest.
        let recorded = beat(&mut old);
        let mut new = b(3);
        intervals_until_proven(&mut alive, &mut new);
        assert_eq!(alive.judge(&recorded), Err(Refusal::Unproven));
        assert_eq!(alive.stamp().2.map(|e| e.session), Some(3));
        assert_eq!(alive.judge(&beat(&mut new)), Ok(Freshness::Fresh));
    }

    /// Two starts in a row: the proof of the first arrives after that of the second.
    #[test]
    fn a_late_proof_of_a_shorter_lived_session_does_not_displace_the_live_one() {
        let (mut alive, mut first, mut second) = (a(1), b(2), b(3));
        let _ = first.judge(&beat(&mut alive));
        let late = beat(&mut first);
        let _ = second.judge(&beat(&mut alive));
        assert_eq!(alive.judge(&beat(&mut second)), Ok(Freshness::NewSession));
        assert_eq!(alive.judge(&late), Err(Refusal::Unproven));
        assert_eq!(alive.judge(&beat(&mut second)), Ok(Freshness::Fresh));
    }

    #[test]
    fn nothing_recorded_before_our_restart_counts_after_it() {
        let (mut before, mut peer) = (a(1), b(2));
        let mut recorded = Vec::new();
        for _ in 0..300 {
            let _ = peer.judge(&beat(&mut before));
            recorded.push(beat(&mut peer));
        }
        let mut after = a(3);
        for heartbeat in recorded.iter().chain(&recorded) {
            after.stamp();
            assert!(after.judge(heartbeat).is_err());
        }
        assert!(!after.is_established());
    }

    #[test]
    fn an_echo_that_is_too_old_or_from_the_future_proves_nothing() {
        for (sequence, expected) in [
            (1, Err(Refusal::Unproven)),
            (299, Err(Refusal::Unproven)),
            (300, Ok(Freshness::NewSession)),
            (500, Ok(Freshness::NewSession)),
            (501, Err(Refusal::Unproven)),
        ] {
            let mut node = a(1);
            for _ in 0..500 {
                node.stamp();
            }
            let mut heartbeat = beat(&mut b(2));
            heartbeat.echo = Some(Echo {
                session: 1,
                sequence,
            });
            assert_eq!(node.judge(&heartbeat), expected, "sequence {sequence}");
        }
    }

    /// Recordings of fifteen former sessions, at a thousand frames per interval, against two nodes
    /// that both have just started.
    #[test]
    fn a_flood_of_recordings_does_not_keep_genuine_nodes_from_proving_each_other() {
        let (mut alive, mut peer) = (a(100), b(200));
        let mut former: Vec<_> = (0..CANDIDATES as u64 - 1).map(|s| b(1_000 + s)).collect();
        let mut intervals = 0;
        while !(alive.is_established() && peer.is_established()) {
            for heartbeat in (0..66).flat_map(|_| former.iter_mut().map(beat).collect::<Vec<_>>()) {
                assert_eq!(alive.judge(&heartbeat), Err(Refusal::Unproven));
            }
            let _ = alive.judge(&beat(&mut peer));
            let _ = peer.judge(&beat(&mut alive));
            intervals += 1;
            assert!(intervals <= 2 * CANDIDATES, "never proven");
        }
    }

    #[test]
    fn replays_do_not_change_what_is_echoed_of_an_established_peer() {
        let (mut alive, mut peer) = (a(1), b(2));
        intervals_until_proven(&mut alive, &mut peer);
        let last = beat(&mut peer);
        assert_eq!(alive.judge(&last), Ok(Freshness::Fresh));
        assert_eq!(alive.judge(&beat(&mut b(9))), Err(Refusal::Unproven));
        let expected = Echo {
            session: 2,
            sequence: last.sequence,
        };
        assert_eq!(alive.stamp().2, Some(expected));
    }

    /// The peer no longer hears us, but we hear it: it lives.
    #[test]
    fn an_established_peer_counts_while_our_heartbeats_are_lost() {
        let (mut node, mut peer) = (a(1), b(2));
        intervals_until_proven(&mut node, &mut peer);
        for _ in 0..1_000 {
            node.stamp();
            assert_eq!(node.judge(&beat(&mut peer)), Ok(Freshness::Fresh));
        }
    }

    #[test]
    fn own_and_foreign_node_ids_are_told_apart() {
        assert_eq!(a(1).judge(&beat(&mut a(5))), Err(Refusal::OwnId(A)));
        let third = Ipv4Addr::new(10, 0, 0, 3);
        let mut stranger = PeerSession::new(third, A, 7, INTERVAL);
        assert_eq!(
            a(1).judge(&beat(&mut stranger)),
            Err(Refusal::UnknownNode(third))
        );
    }
}
