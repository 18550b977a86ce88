//! The connections that run, so that a snapshot can be asked of each.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use rfsis_common::maps::FlowKey;
use tokio::sync::Notify;

use crate::handler::{Resumed, StreamHandler};
use crate::sync::Snapshot;
use crate::tcp_repair;

/// Nobody asks: numbers of late joins begin with 1.
const NOBODY: u32 = 0;

/// What was asked for.
#[derive(Debug)]
pub struct Taken {
    /// The flow.
    pub flow: FlowKey,
    /// Number of the late join.
    pub join: u32,
    /// `None` if no such connection runs, or it cannot be read just now.
    pub snapshot: Option<Snapshot>,
}

/// All connections that run.
#[derive(Debug)]
pub struct Connections {
    running: Mutex<HashMap<FlowKey, Arc<Ask>>>,
    taken: Sender<Taken>,
    wake: Arc<EventFd>,
}

/// Where answers of connections come out.
#[derive(Debug)]
pub struct Snapshots {
    taken: Receiver<Taken>,
    wake: Arc<EventFd>,
}

#[derive(Debug)]
struct Ask {
    join: AtomicU32,
    notify: Notify,
}

/// A connection's entry; it goes with it.
#[derive(Debug)]
pub(super) struct Asked {
    connections: Arc<Connections>,
    flow: FlowKey,
    ask: Arc<Ask>,
}

impl Connections {
    /// None yet.
    ///
    /// # Errors
    /// Of eventfd(2).
    pub fn new() -> io::Result<(Arc<Self>, Snapshots)> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = Arc::new(EventFd::from_flags(flags)?);
        let (sender, taken) = channel();
        let connections = Self {
            running: Mutex::default(),
            taken: sender,
            wake: Arc::clone(&wake),
        };
        Ok((Arc::new(connections), Snapshots { taken, wake }))
    }

    fn running(&self) -> MutexGuard<'_, HashMap<FlowKey, Arc<Ask>>> {
        // Whoever panicked had changed one entry or none.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this connection runs.
    pub fn runs(&self, flow: &FlowKey) -> bool {
        self.running().contains_key(flow)
    }

    /// Asks a connection for a snapshot, which comes out of [`Snapshots`] when its task has its turn.
    pub fn ask(&self, flow: FlowKey, join: u32) {
        match self.running().get(&flow) {
            Some(ask) => {
                ask.join.store(join, Ordering::Release);
                ask.notify.notify_one();
            }
            None => self.answer(flow, join, None),
        }
    }

    fn answer(&self, flow: FlowKey, join: u32, snapshot: Option<Snapshot>) {
        let taken = Taken {
            flow,
            join,
            snapshot,
        };
        // Both fail only when the shadow thread has ended, and then nobody waits.
        let _ = self.taken.send(taken);
        let _ = self.wake.write(1);
    }

    pub(super) fn register(self: &Arc<Self>, flow: FlowKey) -> Asked {
        let ask = Arc::new(Ask {
            join: AtomicU32::new(NOBODY),
            notify: Notify::new(),
        });
        self.running().insert(flow, Arc::clone(&ask));
        Asked {
            connections: Arc::clone(self),
            flow,
            ask,
        }
    }
}

impl Snapshots {
    /// What wakes the thread that takes them.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Call before [`Snapshots::take`] when the thread was woken, so that it is not woken again.
    pub fn calm(&self) {
        let _ = self.wake.read();
    }

    /// The next that was taken.
    pub fn take(&self) -> Option<Taken> {
        self.taken.try_recv().ok()
    }
}

impl Asked {
    /// Returns when somebody may have asked.
    pub(super) async fn wait(&self) {
        self.ask.notify.notified().await;
    }

    /// Whether somebody waits for an answer.
    pub(super) fn is_asked(&self) -> bool {
        self.ask.join.load(Ordering::Acquire) != NOBODY
    }

    /// Answers, if somebody has asked. Call between two turns of the connection.
    pub(super) fn answer(&self, turn: &Turn<'_>) {
        let join = self.ask.join.swap(NOBODY, Ordering::AcqRel);
        if join == NOBODY {
            return;
        }
        let snapshot = match turn.snapshot() {
            Ok(snapshot) => Some(snapshot),
            Err(error) => {
                tracing::debug!(flow = ?self.flow, %error, "no snapshot of a connection");
                None
            }
        };
        self.connections.answer(self.flow, join, snapshot);
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let mut running = self.connections.running();
        // A new connection may have the numbers by now.
        if let Some(known) = running.get(&self.flow)
            && Arc::ptr_eq(known, &self.ask)
        {
            running.remove(&self.flow);
        }
        drop(running);
        let join = self.ask.join.swap(NOBODY, Ordering::AcqRel);
        if join != NOBODY {
            self.connections.answer(self.flow, join, None);
        }
    }
}

/// A connection between two turns: nobody reads its socket, writes to it, or runs its handler.
pub(super) struct Turn<'a> {
    pub(super) socket: BorrowedFd<'a>,
    pub(super) handler: &'a dyn StreamHandler,
    /// Read, and not taken by the handler.
    pub(super) input: &'a [u8],
    /// Written by the handler, and not to the socket.
    pub(super) output: &'a [u8],
    /// The handler writes nothing more.
    pub(super) finished: bool,
}

impl Turn<'_> {
    fn snapshot(&self) -> io::Result<Snapshot> {
        let reading = tcp_repair::read(self.socket)?;
        let input = [self.input, &reading.unread].concat();
        let unacknowledged = reading.unacknowledged.len() as u32;
        let received = input.len() as u32 + u32::from(reading.fin);
        Ok(Snapshot {
            next: reading.received.wrapping_sub(received),
            ack: reading.received,
            edge: reading.edge,
            unacknowledged: reading.written.wrapping_sub(unacknowledged),
            sent: reading.written,
            window: reading.window,
            client: reading.peer,
            active: reading.own,
            fin: reading.fin,
            handler: if self.finished {
                Resumed::new(Vec::new(), None).snapshot()
            } else {
                self.handler.snapshot()
            },
            input,
            output: [&reading.unacknowledged, self.output].concat(),
        })
    }
}
