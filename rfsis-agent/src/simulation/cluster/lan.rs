//! The LAN: what leaves one place and arrives at another, if it does.

use super::*;

impl Cluster {
    /// A segment of the client's enters the LAN.
    pub(super) fn post(&mut self, packet: Vec<u8>) {
        let (flow, segment) = parse(&packet, Direction::ToVip).expect("a sound packet");
        if segment.syn {
            for machine in &mut self.machines {
                let tracks = &mut machine.world.tracks;
                if tracks
                    .get(&flow)
                    .is_none_or(|t| t.client_isn != segment.seq)
                {
                    tracks.insert(flow, Track::of_syn(&segment));
                }
            }
        }
        let Some(owner) = self.owner else {
            return;
        };
        let lan = self.scenario.lan;
        let mut copies = vec![];
        if lan.overlaps > 0 && segment.payload.len() > 1 && self.rng.happens(lan.overlaps) {
            let skip = 1 + self.rng.below(segment.payload.len() as u64 - 1) as usize;
            copies.push(rewrite(&packet, |repr| {
                repr.seq_number += skip;
                repr.payload = &repr.payload[skip..];
            }));
        }
        if self.rng.happens(lan.duplicates) {
            copies.push(packet.clone());
        }
        copies.push(packet);
        for packet in copies {
            let delay = self.delay();
            if !self.is_lost(Lost::Packets, lan.loss) {
                self.at(
                    delay,
                    Event::Arrives {
                        at: owner,
                        packet: packet.clone(),
                        direction: Direction::ToVip,
                        for_us: true,
                        from_peer: false,
                    },
                );
            }
            if !self.scenario.terms.setup.mirror && !self.is_lost(Lost::Copies, lan.copy_loss) {
                let delay = delay + self.rng.below(lan.copy_jitter + 1);
                self.at(
                    delay,
                    Event::Arrives {
                        at: 1 - owner,
                        packet,
                        direction: Direction::ToVip,
                        for_us: false,
                        from_peer: false,
                    },
                );
            }
        }
    }

    pub(super) fn delay(&mut self) -> Nanos {
        self.now + 50_000 + self.rng.below(self.scenario.lan.jitter + 1)
    }

    /// Whether something is lost that gets lost at this rate when all is well.
    pub(super) fn is_lost(&mut self, what: Lost, usual: u64) -> bool {
        let now = self.now;
        let rates = self.spells.iter().filter_map(|spell| match spell.trouble {
            Trouble::Lose {
                what: lost, rate, ..
            } if lost == what && now < spell.until => Some(rate),
            _ => None,
        });
        let rate = rates.max().unwrap_or(0).max(usual);
        self.rng.happens(rate)
    }

    pub(super) fn is_unplugged(&self, place: Place) -> bool {
        matches!(place, Place::Machine(machine) if self.now < self.unplugged[machine])
    }

    pub(super) fn is_cut(&self, from: Place, to: Place) -> bool {
        if self.is_unplugged(from) || self.is_unplugged(to) {
            return true;
        }
        self.spells.iter().any(|spell| {
            matches!(spell.trouble, Trouble::Cut { from: f, to: t, .. } if (f, t) == (from, to))
                && self.now < spell.until
        })
    }

    /// Something leaves a machine.
    pub(super) fn leave(&mut self, from: usize, out: Out) {
        if self.is_unplugged(Place::Machine(from)) {
            return;
        }
        let to = 1 - from;
        let lan = self.scenario.lan;
        match out {
            Out::Packet(packet) => self.leave_for_client(from, packet),
            Out::Copy(packet, direction) => {
                if self.is_lost(Lost::Copies, lan.copy_loss) {
                    return;
                }
                let at = self.now + self.rng.below(lan.copy_jitter + 1);
                let event = Event::Arrives {
                    at: to,
                    packet,
                    direction,
                    for_us: true,
                    from_peer: true,
                };
                self.at(at, event);
            }
            Out::Heartbeat(heartbeat) => {
                self.record(from, Recorded::Heartbeat(heartbeat));
                if !self.is_lost(Lost::Heartbeats, 0) {
                    self.at(self.now, Event::Heartbeat(to, heartbeat));
                }
            }
            Out::Datagram(datagram) => {
                self.record(from, Recorded::Datagram(datagram.clone()));
                if !self.is_lost(Lost::Datagrams, lan.datagram_loss) {
                    let at = self.now + 20_000 + self.rng.below(lan.jitter + 1);
                    self.at(at, Event::Datagram(to, datagram));
                }
            }
            Out::Announce => {
                say!(self, "{}: announces the VIP", name(from));
                self.at(self.now + 30_000, Event::Announce(from));
            }
        }
    }

    pub(super) fn record(&mut self, from: usize, message: Recorded) {
        let replays = |(_, trouble): &(Nanos, Trouble)| matches!(trouble, Trouble::Replay { .. });
        if self.scenario.troubles.iter().any(replays) {
            let recorded = &mut self.recorded[from];
            if recorded.len() == RECORDED {
                recorded.pop_front();
            }
            recorded.push_back(message);
        }
    }

    pub(super) fn leave_for_client(&mut self, from: usize, packet: Vec<u8>) {
        self.check_told(from, &packet);
        let lan = self.scenario.lan;
        let Ok((flow, segment)) = parse(&packet, Direction::FromVip) else {
            return;
        };
        let rst = segment.rst;
        if let Some(ack) = segment.ack.filter(|_| !rst) {
            let told = self.told.entry(flow).or_insert(ack);
            *told = later(*told, ack);
        }
        if segment.syn {
            self.answered.insert(flow);
        }
        if rst {
            self.disowned.insert(flow);
        }
        if !self.scenario.terms.setup.mirror && !self.is_lost(Lost::Copies, lan.copy_loss) {
            let at = self.now + self.rng.below(lan.copy_jitter + 1);
            let event = Event::Arrives {
                at: 1 - from,
                packet: packet.clone(),
                direction: Direction::FromVip,
                for_us: false,
                from_peer: true,
            };
            self.at(at, event);
        }
        // An RST is sent once: a client that waits to be spoken to would not hear of a lost one.
        if !rst && self.is_lost(Lost::Packets, lan.loss) {
            return;
        }
        let copies = 1 + u64::from(self.rng.happens(lan.duplicates));
        for _ in 0..copies {
            let at = self.delay();
            let packet = packet.clone();
            self.at(at, Event::ToClient { from, packet });
        }
    }

    pub(super) fn arrive(
        &mut self,
        at: usize,
        packet: &[u8],
        direction: Direction,
        for_us: bool,
        from_peer: bool,
    ) {
        let from = if from_peer {
            Place::Machine(1 - at)
        } else {
            Place::Client
        };
        if self.is_cut(from, Place::Machine(at)) || self.now < self.off[at] {
            return;
        }
        let Ok((flow, segment)) = parse(packet, direction) else {
            return;
        };
        say!(
            self,
            "{} gets {}{} {}",
            name(at),
            if from_peer { "a copy: " } else { "" },
            flow.client_port,
            Brief(&segment)
        );
        if direction == Direction::ToVip && !from_peer {
            for machine in &mut self.machines {
                if let Some(track) = machine.world.tracks.get_mut(&flow) {
                    track.client_says(&segment);
                }
            }
        }
        let machine = &mut self.machines[at];
        let whose = (for_us && !from_peer, from_peer);
        machine
            .kernel
            .receive(&mut machine.world, packet, direction, whose, self.now);
        machine.wake(self.now);
    }

    pub(super) fn reach_client(&mut self, from: usize, packet: &[u8]) {
        if self.is_cut(Place::Machine(from), Place::Client) {
            return;
        }
        let Ok((flow, segment)) = parse(packet, Direction::FromVip) else {
            return;
        };
        say!(
            self,
            "client gets of {}: {} {}",
            name(from),
            flow.client_port,
            Brief(&segment)
        );
        for machine in &mut self.machines {
            if let Some(track) = machine.world.tracks.get_mut(&flow) {
                track.hear(&segment);
            }
        }
        self.client.receive(packet);
        self.client_next = self.now;
    }
}
