//! What runs on the hosts: servers, and clients that check every byte they get.

use super::*;

/// A connection's server on a stack.
pub(super) struct Server {
    pub(super) handle: SocketHandle,
    pub(super) handler: Box<dyn StreamHandler>,
    pub(super) input: Vec<u8>,
    pub(super) done: bool,
    /// Bytes of the client that the handler has taken, and all that it wrote.
    pub(super) taken: u64,
    pub(super) wrote: Vec<u8>,
}

impl Server {
    pub(super) fn new(handle: SocketHandle, handler: Box<dyn StreamHandler>) -> Self {
        Self {
            handle,
            handler,
            input: vec![],
            done: false,
            taken: 0,
            wrote: vec![],
        }
    }

    /// Drives the handler as far as it goes.
    pub(super) fn run(&mut self, host: &mut Host) {
        let socket = host.socket(self.handle);
        if !socket.may_send() || self.done {
            let _ = socket.recv(|data| (data.len(), ()));
            return;
        }
        loop {
            if self.input.len() < 16 * 1024 && socket.can_recv() {
                let input = &mut self.input;
                let _ = socket.recv(|data| {
                    input.extend_from_slice(data);
                    (data.len(), ())
                });
            }
            let eof = !socket.may_recv() && socket.recv_queue() == 0;
            let (handler, input, wrote) = (&mut self.handler, &self.input, &mut self.wrote);
            let progress = socket
                .send(|room| {
                    let progress = handler.advance(input, eof, room);
                    wrote.extend_from_slice(&room[..progress.produced]);
                    (progress.produced, progress)
                })
                .unwrap_or_default();
            self.input.drain(..progress.consumed);
            self.taken += progress.consumed as u64;
            if progress.finished {
                socket.close();
                self.done = true;
                return;
            }
            if progress.consumed == 0 && progress.produced == 0 {
                return;
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// FIN behind the last byte of the upload; then everything until the server's FIN.
    HalfClose,
    /// FIN once everything that is wanted has come.
    Close,
    /// RST once everything that is wanted has come.
    Abort,
    /// FIN after the server's FIN and not before this time.
    AfterServer { not_before: Nanos },
}

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub service: u16,
    pub upload: u64,
    pub want: u64,
    pub ending: Ending,
    /// Reads this much at once, this often; nothing before `reads_from`.
    pub read: (usize, Nanos),
    pub reads_from: Nanos,
    /// Writes this much at once, this often.
    pub write: (usize, Nanos),
}

impl Plan {
    pub fn echo(bytes: u64) -> Self {
        Self {
            service: ECHO,
            upload: bytes,
            want: bytes,
            ending: Ending::Close,
            read: (usize::MAX, 0),
            reads_from: 0,
            write: (usize::MAX, 0),
        }
    }

    pub fn chargen(bytes: u64) -> Self {
        Self {
            service: CHARGEN,
            upload: 0,
            ending: Ending::Abort,
            ..Self::echo(bytes)
        }
    }

    pub fn discard(bytes: u64) -> Self {
        Self {
            service: DISCARD,
            want: 0,
            ending: Ending::HalfClose,
            ..Self::echo(bytes)
        }
    }

    pub fn daytime(not_before: Nanos) -> Self {
        Self {
            service: DAYTIME,
            upload: 0,
            want: 22,
            ending: Ending::AfterServer { not_before },
            ..Self::echo(0)
        }
    }

    pub fn half_close(self) -> Self {
        Self {
            ending: Ending::HalfClose,
            ..self
        }
    }

    pub fn slow(self, chunk: usize, every: Nanos) -> Self {
        Self {
            read: (chunk, every),
            ..self
        }
    }

    pub fn typed(self, chunk: usize, every: Nanos) -> Self {
        Self {
            write: (chunk, every),
            ..self
        }
    }
}

/// Byte `at` of what the client behind `port` sends.
pub fn byte(port: u16, at: u64) -> u8 {
    let x = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(port) << 17);
    (x ^ (x >> 29)) as u8
}

#[derive(Debug)]
pub struct Conn {
    pub port: u16,
    pub plan: Plan,
    pub(super) handle: SocketHandle,
    pub sent: u64,
    pub got: u64,
    pub(super) text: Vec<u8>,
    pub(super) next_read: Nanos,
    pub(super) next_write: Nanos,
    pub ended: bool,
    pub reset: bool,
    pub eof: bool,
    pub(super) peer_closed: bool,
}

impl Conn {
    pub fn flow(&self) -> FlowKey {
        flow_key(CLIENT, self.port, self.plan.service)
    }

    pub(super) fn run(&mut self, host: &mut Host, now: Nanos) {
        let socket = host.socket(self.handle);
        if now >= self.next_write && self.sent < self.plan.upload && socket.can_send() {
            let left = self.plan.upload - self.sent;
            let limit = (self.plan.write.0 as u64).min(left) as usize;
            let (port, from) = (self.port, self.sent);
            let count = socket
                .send(|room| {
                    let count = room.len().min(limit);
                    for (at, slot) in room[..count].iter_mut().enumerate() {
                        *slot = byte(port, from + at as u64);
                    }
                    (count, count)
                })
                .unwrap();
            self.sent += count as u64;
            self.next_write = now + self.plan.write.1;
        }
        if now >= self.next_read.max(self.plan.reads_from) && socket.can_recv() {
            let mut limit = self.plan.read.0;
            while limit > 0 && socket.can_recv() {
                let mut data = vec![0; limit.min(65_536)];
                let count = socket.recv_slice(&mut data).unwrap();
                data.truncate(count);
                limit -= count;
                self.check(&data);
            }
            self.next_read = now + self.plan.read.1;
        }
        self.peer_closed |= matches!(
            socket.state(),
            State::CloseWait | State::Closing | State::TimeWait | State::LastAck
        );
        if self.peer_closed && !self.eof && socket.recv_queue() == 0 {
            self.eof = true;
            assert!(
                self.got >= self.plan.want && self.sent == self.plan.upload,
                "port {}: the server's FIN came after {} of {} bytes",
                self.port,
                self.got,
                self.plan.want
            );
        }
        let uploaded = self.sent == self.plan.upload;
        let satisfied = uploaded && self.got >= self.plan.want;
        match self.plan.ending {
            _ if self.ended || socket.state() == State::SynSent => {}
            Ending::HalfClose if uploaded => {
                socket.close();
                self.ended = true;
            }
            Ending::Close if satisfied => {
                socket.close();
                self.ended = true;
            }
            Ending::Abort if satisfied => {
                socket.abort();
                self.ended = true;
            }
            Ending::AfterServer { not_before } if self.eof && now >= not_before => {
                socket.close();
                self.ended = true;
            }
            _ => {}
        }
        let cut_off = !self.peer_closed && self.plan.ending != Ending::Abort;
        if socket.state() == State::Closed && (!self.ended || cut_off) {
            self.reset = true;
        }
    }

    pub(super) fn check(&mut self, data: &[u8]) {
        let mut expected = vec![0; data.len()];
        match self.plan.service {
            ECHO => {
                for (at, slot) in expected.iter_mut().enumerate() {
                    *slot = byte(self.port, self.got + at as u64);
                }
            }
            CHARGEN => chargen_fill(self.got, &mut expected),
            DAYTIME => {
                self.text.extend_from_slice(data);
                expected.copy_from_slice(data);
            }
            service => panic!("service {service} sent {} bytes", data.len()),
        }
        let at = self.got;
        if let Some(wrong) = (0..data.len()).find(|&i| data[i] != expected[i]) {
            panic!(
                "port {}: a wrong byte at offset {}",
                self.port,
                at + wrong as u64
            );
        }
        self.got += data.len() as u64;
    }

    pub(super) fn wakes_at(&self, now: Nanos) -> Nanos {
        let mut at = Nanos::MAX;
        for time in [self.next_read, self.next_write, self.plan.reads_from] {
            if time > now {
                at = at.min(time);
            }
        }
        if let Ending::AfterServer { not_before } = self.plan.ending
            && not_before > now
        {
            at = at.min(not_before);
        }
        at
    }
}
