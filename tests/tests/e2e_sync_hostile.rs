//! Hostile datagrams on the sync channel: counted, ignored, without effect.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::net::Ipv4Addr;

use rfsis_agent::sync::{Channel, MAX_DATAGRAM, channel};
use rfsis_common::prompt;
use tests::agent::port;
use tests::forge::{sync_datagram_of, sync_frame};
use tests::patience::{PATIENCE, slowed};
use tests::wire::Wire;
use tests::{Agent, Death, Host, Pair, Settings, Typist, Wiring};

const DATAGRAMS: &str = "rfsis_sync_datagrams_total";

fn received(result: &str) -> [(&str, &str); 2] {
    [("direction", "received"), ("result", result)]
}

/// What a datagram says, if it is genuine.
struct Header {
    epoch: u64,
    sender_session: u64,
    receiver_session: u64,
}

impl Header {
    fn of(datagram: &[u8]) -> Self {
        let number = |at: usize| u64::from_be_bytes(datagram[at..at + 8].try_into().unwrap());
        Self {
            epoch: number(24),
            sender_session: number(32),
            receiver_session: number(40),
        }
    }

    /// A datagram that says the same, made with this key for this cluster.
    fn sealed(&self, key: &str, cluster: &str, from: Host, to: Host) -> Vec<u8> {
        let (from, to) = (from.address(), to.address());
        let mut channel = Channel::new(key.as_bytes(), cluster, from, to, self.sender_session);
        channel.set_peer(Some(self.receiver_session));
        let mut made = Vec::new();
        channel.seal(self.epoch, true, [], |datagram| made = datagram.to_vec());
        made
    }
}

/// A datagram that must have no effect.
struct Forgery {
    /// What it is counted as.
    result: &'static str,
    source: Ipv4Addr,
    datagram: Vec<u8>,
}

/// All kinds, made of genuine datagrams of `peer` and of `victim`.
fn forgeries(
    victim: Host,
    peer: Host,
    genuine: &[u8],
    own: &[u8],
    told: &Settings,
) -> Vec<Forgery> {
    let header = Header::of(genuine);
    let sealed = |header: Header| header.sealed(&told.key, &told.cluster, peer, victim);
    let changed = |at: usize| {
        let mut datagram = genuine.to_vec();
        datagram[at] ^= 1;
        datagram
    };
    let mut kinds = vec![
        ("stale", genuine.to_vec()),
        ("truncated", genuine[..71].to_vec()),
        ("truncated", Vec::new()),
        ("malformed", vec![0; 72]),
        ("malformed", vec![0x52; MAX_DATAGRAM + 1]),
        ("malformed", changed(4)),
        ("own_id", own.to_vec()),
    ];
    // Without the key nothing can be changed: flags, node, epoch, sessions, sequence, MAC.
    let fields = [5, 19, 31, 39, 47, 55, genuine.len() - 1];
    kinds.extend(fields.map(|at| ("bad_mac", changed(at))));
    let another_key = "another key, of 32 bytes or more";
    kinds.push((
        "bad_mac",
        header.sealed(another_key, &told.cluster, peer, victim),
    ));
    kinds.push((
        "wrong_cluster",
        header.sealed(&told.key, "somebody else's", peer, victim),
    ));
    // What only who has the key can make, and could have made at another time.
    let Header {
        epoch,
        sender_session,
        receiver_session,
    } = header;
    kinds.push((
        "wrong_epoch",
        sealed(Header {
            epoch: epoch + 1,
            sender_session,
            receiver_session,
        }),
    ));
    kinds.push((
        "wrong_session",
        sealed(Header {
            epoch,
            sender_session: sender_session ^ 1,
            receiver_session,
        }),
    ));
    kinds.push((
        "wrong_session",
        sealed(Header {
            epoch,
            sender_session,
            receiver_session: receiver_session ^ 1,
        }),
    ));
    let mut forged: Vec<_> = kinds
        .into_iter()
        .map(|(result, datagram)| Forgery {
            result,
            source: peer.address(),
            datagram,
        })
        .collect();
    forged.push(Forgery {
        result: "unknown_node",
        source: Host::Client.address(),
        datagram: genuine.to_vec(),
    });
    forged
}

/// The next datagram of each of two hosts, as seen at the first.
fn genuine_at(wire: &Wire, host: Host, peer: Host) -> (Vec<u8>, Vec<u8>) {
    let next = |of: Host| {
        let heard = wire.hear(slowed(PATIENCE), |frame| {
            let datagram = sync_datagram_of(frame, of)?;
            datagram
                .starts_with(&channel::MAGIC)
                .then(|| datagram.to_vec())
        });
        heard.unwrap().expect("a sync datagram on the wire")
    };
    (next(host), next(peer))
}

#[test]
fn forged_replayed_and_truncated_sync_datagrams_are_counted_and_ignored() {
    const REPEATS: usize = 10;
    let lab = Wiring::Mirror.lab();
    let settings = Wiring::Mirror.settings();
    let pair = Pair::start_guarding(&lab, &settings);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    let attacker = Wire::open(lab.client()).unwrap();

    for (victim, peer) in [(&pair.primary, &pair.backup), (&pair.backup, &pair.primary)] {
        let (host, other) = (victim.host(), peer.host());
        let (own, genuine) = genuine_at(&Wire::open(lab.host(host)).unwrap(), host, other);
        let forged = forgeries(host, other, &genuine, &own, &settings);
        // What is replayed must have come before.
        let fresh = victim.metrics().sum(DATAGRAMS, &received("ok"));
        victim.wait_metric(DATAGRAMS, &received("ok"), fresh + 2.0);
        let before = victim.metrics();
        let state = victim.status().unwrap();
        for _ in 0..REPEATS {
            for Forgery {
                source, datagram, ..
            } in &forged
            {
                attacker.send(&sync_frame(*source, host, datagram)).unwrap();
            }
            nc.echoes("in between");
        }
        for Forgery { result, .. } in &forged {
            let kinds = forged.iter().filter(|kind| kind.result == *result).count();
            let least = before.sum(DATAGRAMS, &received(result)) + (kinds * REPEATS) as f64;
            victim.wait_metric(DATAGRAMS, &received(result), least);
        }
        let after = victim.status().unwrap();
        for field in ["state", "epoch", "failovers", "flows"] {
            assert_eq!(after[field], state[field], "{field} of {host:?}");
        }
    }
    is_undisturbed(&pair.primary);
    nc.echoes("after");
    pair.primary_dies(&lab, Death::Kill9);
    nc.echoes("from the shadow");
    assert!(nc.hang_up().success());
}

fn is_undisturbed(active: &Agent) {
    let log = active.log();
    assert!(!log.contains("degraded"), "{log}");
    let scrape = active.wait_protection("sync");
    for (condition, count) in [("opening", 0.0), ("guarded", 1.0), ("exposed", 0.0)] {
        let labels = [("condition", condition)];
        assert_eq!(
            scrape.sum("rfsis_guarded_flows", &labels),
            count,
            "{condition}"
        );
    }
    assert_eq!(scrape.sum("rfsis_guard_refused_total", &[]), 0.0);
}

#[test]
fn forged_replayed_and_truncated_prompt_datagrams_are_counted_and_ignored() {
    const REPEATS: usize = 10;
    let lab = Wiring::Mirror.lab();
    let pair = Pair::start_guarding(&lab, &Wiring::Mirror.settings());
    let (victim, peer) = (pair.primary.host(), pair.backup.host());
    let wire = Wire::open(lab.host(victim)).unwrap();
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    // Flows are counted now and then, and what follows takes less.
    let guarded = [("condition", "guarded")];
    pair.primary
        .wait_metric("rfsis_guarded_flows", &guarded, 1.0);
    let attacker = Wire::open(lab.client()).unwrap();
    let genuine = wire
        .hear(slowed(PATIENCE), |frame| {
            let datagram = sync_datagram_of(frame, peer)?;
            datagram
                .starts_with(&prompt::MAGIC)
                .then(|| datagram.to_vec())
        })
        .unwrap()
        .expect("a prompt datagram on the wire");
    let last = genuine.len() - 1;
    let changed = |at: usize| {
        let mut datagram = genuine.clone();
        datagram[at] ^= 1;
        datagram
    };
    let mut forged = vec![
        ("stale", genuine.clone()),
        ("truncated", genuine[..last - 24].to_vec()),
        ("malformed", [&genuine[..], &[0]].concat()),
        ("malformed", changed(4)),
    ];
    // Sequence, port, client's number, acknowledgement, right edge, tag.
    let fields = [23, 29, 35, 39, 43, last];
    forged.extend(fields.map(|at| ("bad_mac", changed(at))));
    // What a device may write makes it no other one.
    forged.push(("stale", changed(15)));
    let before = pair.primary.metrics();
    for _ in 0..REPEATS {
        for (_, datagram) in &forged {
            for frame in [
                sync_frame(peer.address(), victim, datagram),
                unchecked(sync_frame(peer.address(), victim, datagram)),
            ] {
                attacker.send(&frame).unwrap();
            }
        }
        nc.echoes("in between");
    }
    for (result, _) in &forged {
        let kinds = forged.iter().filter(|kind| kind.0 == *result).count();
        let least = before.sum(DATAGRAMS, &received(result)) + (2 * kinds * REPEATS) as f64;
        let labels = received(result);
        pair.primary.wait_metric(DATAGRAMS, &labels, least);
    }
    is_undisturbed(&pair.primary);
    nc.echoes("after");
    pair.primary_dies(&lab, Death::Kill9);
    nc.echoes("from the shadow");
    assert!(nc.hang_up().success());
}

/// The same without the UDP checksum, as the kernel's programs take them.
fn unchecked(mut frame: Vec<u8>) -> Vec<u8> {
    // Behind Ethernet, and IPv4 without options.
    frame[40..42].fill(0);
    frame
}
