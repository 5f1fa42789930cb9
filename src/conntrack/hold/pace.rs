//! How fast held datagrams are let go.
//!
//! TCP looks after itself: its peers have a window, and its receiver takes back what it advertised.
//! Datagrams that come all at once overflow whatever queue is the shortest on their way: the
//! tunnel's, or the receiving socket's buffer (212,992 bytes unless the program asked for more: some
//! 270 small datagrams). So they are let go in portions, in two ways:
//!
//! - [`Pace::Rate`], where they have to travel: faster than they arrive, so that it comes to an end,
//!   and no faster than the tunnel takes them, which its count of sent packets tells.
//! - [`Pace::Sockets`], where the container is: as many as fit into its sockets, which socket
//!   diagnosis tells.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::keeper::Held;
use crate::conntrack::Result;
use crate::netlink::Namespace;
use crate::netlink::sockets::{Diagnosis, Kind, Socket, StateSet};

/// How fast held datagrams are let go. Everything else goes at once.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum Pace {
    /// As fast as the kernel takes them.
    #[default]
    Unpaced,
    /// At a rate.
    Rate(Rate),
    /// As fast as the UDP sockets of a network namespace take them.
    Sockets(Namespace),
}

/// A rate at which held datagrams are let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// How many times as fast as they arrive.
    ///
    /// Four times: a backlog of a second is gone after a third of one, and no datagram waits more
    /// than a quarter longer than it has to.
    pub times: u32,
    /// The least, in packets a second.
    ///
    /// 20,000: less than userspace WireGuard carries, and a thousand datagrams, which is what a
    /// modest sender sends while its container moves, are gone after 50 ms. It may be more than the
    /// sockets at the other end take: those have an [`Intake`](super::Intake) before them.
    pub floor: u32,
}

impl Default for Rate {
    fn default() -> Self {
        Rate {
            times: 4,
            floor: 20_000,
        }
    }
}

/// How many datagrams may be on their way into the hop's interface that it has not sent. Half of
/// the shortest queue that such an interface has: 500 packets of a TUN device (`TUN_READQ_SIZE` of
/// `drivers/net/tun.c`).
const WINDOW: u64 = 250;
/// After how long without a packet sent the interface counts as empty: what was let go went
/// elsewhere.
const STANDSTILL: Duration = Duration::from_millis(20);
/// How many datagrams are let into sockets between two looks at them.
const PORTION: usize = 128;
/// What a datagram takes of a socket's buffer beside twice its length, in bytes. Small ones were
/// seen to take from 768 to 2304, by the way they came.
const OVERHEAD: u64 = 2304;
/// The same for each of several that were put together, which the socket gets one by one.
const OVERHEAD_OF_MANY: u64 = 768;
/// How many may have been put together: `UDP_MAX_SEGMENTS` of `linux/udp.h`.
const MANY: u64 = 128;
/// How long each of them is at least, in bytes, for all that the kernel tells.
const SHORT: u64 = 8;
/// After how long a socket that does not get emptier counts as one that nobody reads.
const UNREAD: Duration = Duration::from_millis(200);

/// A pace, while packets are being let go.
#[derive(Debug)]
pub(super) enum Pacer {
    Unpaced,
    Rate(Metered),
    Sockets(Room),
}

impl Pacer {
    /// `arrival` is the rate at which datagrams have been arriving, in packets a second; `hop` the
    /// interface that they leave by.
    pub(super) fn new(pace: &Pace, arrival: f64, hop: Option<String>) -> Result<Pacer> {
        Ok(match pace {
            Pace::Unpaced => Pacer::Unpaced,
            Pace::Rate(rate) => Pacer::Rate(Metered {
                per_second: (arrival * f64::from(rate.times)).max(f64::from(rate.floor.max(1))),
                credit: 0.0,
                last: Instant::now(),
                window: hop.map(Window::new),
            }),
            Pace::Sockets(namespace) => Pacer::Sockets(Room {
                diagnosis: Diagnosis::open(namespace)?,
                emptied: HashMap::new(),
                drops: 0,
            }),
        })
    }

    pub(super) fn is_paced(&self) -> bool {
        !matches!(self, Pacer::Unpaced)
    }

    /// How long to wait between two portions.
    pub(super) fn tick(&self) -> Duration {
        match self {
            Pacer::Unpaced => Duration::ZERO,
            Pacer::Rate(_) => Duration::from_millis(1),
            Pacer::Sockets(_) => Duration::from_micros(500),
        }
    }

    /// How many of the packets at the front may go now.
    pub(super) fn portion(&mut self, waiting: &VecDeque<Held>) -> Result<usize> {
        match self {
            Pacer::Unpaced => Ok(waiting.len()),
            Pacer::Rate(metered) => Ok(metered.portion().min(waiting.len())),
            Pacer::Sockets(_) if waiting.is_empty() => Ok(0),
            Pacer::Sockets(room) => room.portion(waiting),
        }
    }

    /// So many have gone, of which so many were the container's own and left by another interface.
    pub(super) fn gone(&mut self, packets: usize, own: usize) {
        if let Pacer::Rate(metered) = self {
            metered.credit -= packets as f64;
            if let Some(window) = &mut metered.window {
                window.under_way += (packets - own) as u64;
            }
        }
    }
}

/// A rate, as a credit that grows with time.
#[derive(Debug)]
pub(super) struct Metered {
    per_second: f64,
    credit: f64,
    last: Instant,
    window: Option<Window>,
}

impl Metered {
    fn portion(&mut self) -> usize {
        /// How long credit is saved up for: a late tick is made up for, a long sleep is not.
        const SAVED: f64 = 0.005;
        let now = Instant::now();
        let passed = now.duration_since(self.last).as_secs_f64();
        self.last = now;
        self.credit = (self.credit + passed * self.per_second).min(self.per_second * SAVED + 1.0);
        let by_rate = self.credit.max(0.0) as usize;
        match &mut self.window {
            Some(window) => by_rate.min(window.room(now) as usize),
            None => by_rate,
        }
    }
}

/// What is on its way into an interface: what was let go, less what it has sent.
///
/// An interface counts a packet as sent when the tunnel has taken it out of its queue
/// (`tun_put_user` of `drivers/net/tun.c`, `iptunnel_xmit_stats` for the kernel's WireGuard).
/// Others' packets are counted too, which makes the window wider than it should be for a tick.
#[derive(Debug)]
struct Window {
    interface: String,
    sent: Option<u64>,
    moved: Instant,
    under_way: u64,
}

impl Window {
    fn new(interface: String) -> Window {
        Window {
            sent: sent_by(&interface),
            interface,
            moved: Instant::now(),
            under_way: 0,
        }
    }

    fn room(&mut self, now: Instant) -> u64 {
        let sent = sent_by(&self.interface);
        match (sent, self.sent) {
            (Some(new), Some(old)) if new != old => {
                self.under_way = self.under_way.saturating_sub(new.saturating_sub(old));
                self.moved = now;
            }
            (Some(_), Some(_)) if now.duration_since(self.moved) < STANDSTILL => {}
            // It cannot be asked, or nothing of ours goes there.
            _ => self.under_way = 0,
        }
        self.sent = sent;
        if self.under_way == 0 {
            self.moved = now;
        }
        WINDOW.saturating_sub(self.under_way)
    }
}

/// How many packets an interface has sent, from the calling thread's network namespace: the tenth
/// number in its line (`dev_seq_printf_stats` of `net/core/net-procfs.c`).
fn sent_by(interface: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").ok()?;
    text.lines().find_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        if name.trim() != interface {
            return None;
        }
        numbers.split_whitespace().nth(9)?.parse().ok()
    })
}

/// The free room in the UDP sockets of a namespace.
#[derive(Debug)]
pub(super) struct Room {
    diagnosis: Diagnosis,
    /// What was in each socket, by its inode number, and when it was last less than before.
    emptied: HashMap<u32, (u64, Instant)>,
    /// How many packets the sockets have dropped, as of the last look.
    drops: u32,
}

impl Drop for Room {
    fn drop(&mut self) {
        tracing::debug!(drops = self.drops, "the sockets have taken what there was");
    }
}

impl Room {
    /// As many of the packets at the front as fit into the fullest socket, whichever they are for.
    fn portion(&mut self, waiting: &VecDeque<Held>) -> Result<usize> {
        let sockets = self.diagnosis.look(Kind::Udp, StateSet::ALL)?;
        let buffers = sockets.iter().filter_map(|socket| socket.receive_buffer);
        self.drops = buffers.map(|buffer| buffer.drops).sum();
        let free = self.free(&sockets);
        // What went before may not have arrived yet: half of the room is kept for that.
        let mut room = free.least.unwrap_or(u64::MAX) / 2;
        let fits = waiting.iter().take(PORTION).take_while(|held| {
            let length = u64::from(held.length);
            let many = match held.together {
                true => (length / SHORT).min(MANY),
                false => 0,
            };
            let cost = OVERHEAD.max(many * OVERHEAD_OF_MANY) + 2 * length;
            let fits = cost <= room;
            room = room.saturating_sub(cost);
            fits
        });
        // What does not fit into an empty socket by this reckoning may fit all the same.
        Ok(fits.count().max(usize::from(free.all_empty)))
    }

    fn free(&mut self, sockets: &[Socket]) -> Free {
        let now = Instant::now();
        let mut found = Free {
            least: None,
            all_empty: true,
        };
        let mut seen = HashMap::with_capacity(sockets.len());
        for socket in sockets {
            let Some(buffer) = socket.receive_buffer else {
                continue;
            };
            let (used, size) = (u64::from(buffer.used), u64::from(buffer.size));
            let emptied = match self.emptied.get(&socket.inode) {
                Some((before, since)) if used > 0 && used >= *before => *since,
                _ => now,
            };
            seen.insert(socket.inode, (used, emptied));
            if used > 0 && now.duration_since(emptied) >= UNREAD {
                continue;
            }
            let free = size.saturating_sub(used);
            found.least = Some(found.least.map_or(free, |least| least.min(free)));
            found.all_empty &= used == 0;
        }
        self.emptied = seen;
        found
    }
}

/// The room in those sockets that somebody reads.
#[derive(Debug, Clone, Copy)]
struct Free {
    /// In the fullest, in bytes; none if there is no such socket.
    least: Option<u64>,
    all_empty: bool,
}
