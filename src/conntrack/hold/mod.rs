//! Keeping a container's packets in the kernel, undelivered and undropped, while it is nowhere.
//!
//! Packets wait in a netfilter queue. Only their numbers, lengths and IP headers come to this
//! process; what is in them stays in the kernel, whole (segments that the network card put together
//! are not cut again). On release they go on, in order, behind the chain that held them: into
//! [`steer`](super::steer), where they meet the mark that their connection has by then.
//!
//! ```text
//! chain new { priority -310: before conntrack
//!   jump hold7_new }
//! chain established { priority -150: after conntrack, before the guard and steering
//!   jump hold7 }
//! chain hold7_new {
//!   SYNs to published ports                                            goto queue7_new
//!   to published ports, from programs here and from masqueraded peers  goto queue7 }
//! chain hold7 {
//!   those, released                                                    return
//!   what came out of the destination's hop from the container's address goto queue7
//!   packets of inbound flows:  direction original, answered by it      goto queue7
//!   packets of outbound flows: direction reply, opened by it           goto queue7
//!   new UDP flows to published ports                                   goto queue7_new }
//! chain queue7_new { queue flags bypass to 7 }      the first switch
//! chain queue7 { queue flags bypass to 7 }          the second switch
//! ```
//!
//! Both are there for what programs of this host send, too (hook `output`).
//!
//! There are two switches, so that newcomers can wait while connections that are being opened
//! become established and what has arrived is read: [`Hold::hold_newcomers`], then
//! [`Hold::hold_all`].
//!
//! What the container itself sends is not held: it is about to be frozen.
//!
//! SYNs are held before conntrack because an entry that is not in the table yet belongs to the one
//! packet that made it; a SYN sent again would clash with the first one when both are released.
//! (UDP flows that begin during a hold may have several packets; their clash is one that the
//! kernel resolves, `nf_ct_resolve_clash`.) The entries of masqueraded peers are made over again
//! during the hold, and a packet that waits behind conntrack would still belong to the old one.
//!
//! # The end of a hold
//! TCP goes first and at once; datagrams follow at a [`Pace`] that does not overflow what is on
//! their way. While packets are released others arrive, and queue behind. At some moment the queue
//! has to be left out, and a packet that arrives then must not overtake one that is still in it.
//! Removing the rule cannot do that: it takes effect while packets wait. Instead, one single message
//! to the kernel (a) releases all there is, many times, (b) makes the queue's length zero and lets
//! packets pass a full queue, (c) releases what came in between (a) and (b). Between two parts of
//! it lie microseconds. After that, packets pass the queue without waiting, and the rules can be
//! removed at leisure.
//!
//! # At the destination
//! What the source lets go can come faster than the restored container reads it, and sooner than it
//! reads at all. An [`Intake`] is a hold there, of what comes out of the hop.
//!
//! # When this process dies
//! The kernel drops what is in a queue whose socket is closed (`nfqnl_flush`); TCP sends it again,
//! UDP does not. New packets pass, because the rule says `bypass`. Nothing stays blocked, and
//! [`remove_rules`] clears away what is left. A [`Hold`] that is merely dropped releases what it
//! holds first.
//!
//! # What can still lose held packets
//! A program that removes a chain with a hook from this network namespace (`nft flush ruleset`, a
//! firewall that is restarted; not Podman, which only adds and removes rules) makes the kernel drop
//! all that waits in queues, and so does the removal of the interface that they came in by.

mod intake;
mod keeper;
mod pace;
mod queue;
mod report;
mod spec;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub use intake::Intake;
use keeper::{Gauge, Order, REMOVE, Terms, work};
pub use pace::{Pace, Rate};
#[cfg(any(test, fuzzing))]
pub(super) use queue::Notice;
use queue::{Queue, socket_error};
pub use report::{HoldReport, To};
pub use spec::{HeldPorts, HoldSpec, PortProtocol, Side};

use super::ruleset::{self, Rules};
use super::{Error, Result};

/// Before conntrack looks (−200), after fragments are put together (−400), at the place of `raw`
/// (−300): `enum nf_ip_hook_priorities` of `linux/netfilter_ipv4.h`.
pub const NEW_PRIORITY: i32 = -310;
/// After conntrack, before [`steer::PRIORITY`](super::steer::PRIORITY).
pub const PRIORITY: i32 = -150;
/// How many packets a hold keeps unless told otherwise: 50,000 datagrams a second for more than a
/// second. Each takes about 1 KiB of kernel memory for a small packet, up to 64 KiB for one that
/// the network card put together.
pub const DEFAULT_PACKETS: u32 = 65_536;
/// How many bytes of packets a hold keeps unless told otherwise: 2 Gbit/s for a second.
pub const DEFAULT_BYTES: u64 = 256 << 20;

/// A netfilter queue that is this process's own, and nothing leads to yet.
///
/// Binding it comes first, so that its number can be written into a journal before there are rules
/// with that number: two migrations at the same moment never share one.
#[derive(Debug)]
pub struct Reserved {
    queue: Queue,
}

impl Reserved {
    /// Reserves the first free queue of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::NoFreeQueue`], or when the kernel cannot be asked.
    pub fn first_free() -> Result<Reserved> {
        Ok(Reserved {
            queue: Queue::first_free()?,
        })
    }

    /// Reserves the queue of this number.
    ///
    /// # Errors
    /// [`Error::QueueTaken`], or when the kernel cannot be asked.
    pub fn of_number(queue: u16) -> Result<Reserved> {
        Ok(Reserved {
            queue: Queue::of_number(queue)?,
        })
    }

    /// Its number, for [`HoldSpec::queue`].
    pub fn queue(&self) -> u16 {
        self.queue.number
    }

    /// Makes everything ready, rules included, in the calling thread's network namespace. Nothing
    /// waits yet.
    ///
    /// # Errors
    /// [`Error::BadHold`] when the specification makes no sense; when `nft` or the kernel refuses.
    pub async fn prepare(self, spec: HoldSpec) -> Result<Hold> {
        spec.check()?;
        if spec.queue != self.queue() {
            return Err(Error::BadHold {
                what: "its queue is not the one that was reserved",
            });
        }
        // What a tunnel has put together of small datagrams is let in one by one.
        let whole = spec.side != Side::Arriving;
        self.queue.set_up(spec.packets, whole)?;
        let mut rules = Rules::open()?;
        // The queue was free, so if there are such rules their process has died.
        rules.remove(REMOVE, &spec.chains(), Vec::new)?;
        ruleset::apply("set up the rules of a hold", spec.commands()).await?;
        let (orders, received) = mpsc::unbounded_channel();
        let (pass, passed) = oneshot::channel();
        let gauge = Arc::new(Gauge::default());
        let thread = std::thread::Builder::new()
            .name("livemig-hold".to_owned())
            .spawn({
                let (spec, gauge) = (spec.clone(), Arc::clone(&gauge));
                move || work(&spec, self.queue, received, pass, &gauge)
            })
            .map_err(|source| socket_error("start the thread of a hold", source))?;
        // From here on, dropping clears everything away.
        Ok(Hold {
            spec,
            since: None,
            rules,
            orders,
            passed: Some(passed),
            thread: Some(thread),
            gauge,
        })
    }
}

/// Packets being held. Dropping it releases them to the source.
#[derive(Debug)]
pub struct Hold {
    spec: HoldSpec,
    since: Option<Instant>,
    rules: Rules,
    orders: mpsc::UnboundedSender<Order>,
    passed: Option<oneshot::Receiver<Instant>>,
    thread: Option<JoinHandle<Result<HoldReport>>>,
    gauge: Arc<Gauge>,
}

impl Hold {
    /// Holds everything, newcomers too, from when this returns on, in the calling thread's network
    /// namespace.
    ///
    /// # Errors
    /// As [`Reserved::of_number`] and [`Reserved::prepare`].
    pub async fn start(spec: HoldSpec) -> Result<Hold> {
        let mut hold = Reserved::of_number(spec.queue)?.prepare(spec).await?;
        hold.hold_newcomers()?;
        hold.hold_all()?;
        Ok(hold)
    }

    /// The first switch: from now on new connections and new UDP flows wait.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn hold_newcomers(&mut self) -> Result<()> {
        // The rules lead to an empty chain so far. The rule put into it takes effect at once,
        // without another start of nft.
        let chain = self.spec.new_queue_chain();
        self.rules.add_queue(&chain, self.spec.queue)
    }

    /// The second switch: from now on packets of known flows wait as well.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn hold_all(&mut self) -> Result<()> {
        self.since = Some(Instant::now());
        let chain = self.spec.queue_chain();
        self.rules.add_queue(&chain, self.spec.queue)
    }

    /// What is being held.
    pub fn spec(&self) -> &HoldSpec {
        &self.spec
    }

    /// The moment before the first packet of a known flow could wait; none before
    /// [`Hold::hold_all`].
    pub fn since(&self) -> Option<Instant> {
        self.since
    }

    /// How many packets have been held so far.
    pub fn held(&self) -> u64 {
        self.gauge.held.load(Ordering::Relaxed)
    }

    /// Is cancelled as soon as one of the bounds is reached, from when on the newest packets are
    /// dropped.
    pub fn full(&self) -> CancellationToken {
        self.gauge.full.clone()
    }

    /// Releases everything, within a flow in the order it arrived, and returns when packets pass
    /// without waiting.
    ///
    /// If the returned future is dropped the release goes on to its end all the same.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or refuses. The rules are gone then, and nothing waits.
    pub async fn release(mut self, to: To, pace: Pace) -> Result<Released> {
        self.order(Order::Release(Terms {
            to,
            pace,
            until_finish: false,
        }));
        self.passed().await
    }

    fn order(&self, order: Order) {
        // If the thread is gone its own error, from joining it, says why.
        let _ = self.orders.send(order);
    }

    /// Waits until packets pass.
    async fn passed(&mut self) -> Result<Released> {
        const DOING: &str = "release packets";
        let (Some(thread), Some(passed)) = (self.thread.take(), self.passed.take()) else {
            return Err(Error::Thread { doing: DOING });
        };
        match passed.await {
            Ok(began) => Ok(Released { thread, began }),
            // It failed: what it has to say is why.
            Err(_) => Err(ended(thread)
                .await
                .err()
                .unwrap_or(Error::Thread { doing: DOING })),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Packets must not wait for a caller who has gone. This takes milliseconds.
        if let Some(thread) = self.thread.take() {
            self.order(Order::Release(Terms {
                to: To::Source,
                pace: Pace::Unpaced,
                until_finish: false,
            }));
            match thread.join() {
                Ok(Ok(report)) => tracing::debug!(?report, "a hold was dropped and released"),
                Ok(Err(error)) => tracing::warn!(%error, "a hold was dropped and not released"),
                Err(_) => tracing::warn!("the thread of a hold panicked"),
            }
        }
    }
}

/// A hold that lets packets pass. Its rules are being removed, which takes some 40 ms, whether
/// anybody waits for that or not.
#[derive(Debug)]
#[must_use = "only after `clear` is the hold's report known and are its rules gone"]
pub struct Released {
    thread: JoinHandle<Result<HoldReport>>,
    began: Instant,
}

impl Released {
    /// When the first of what waited had been let go.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Waits until the rules are gone.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or refuses.
    pub async fn clear(self) -> Result<HoldReport> {
        ended(self.thread).await
    }
}

async fn ended(thread: JoinHandle<Result<HoldReport>>) -> Result<HoldReport> {
    const DOING: &str = "remove the rules of a hold";
    tokio::task::spawn_blocking(move || thread.join())
        .await
        .ok()
        .and_then(std::thread::Result::ok)
        .ok_or(Error::Thread { doing: DOING })?
}

/// Removes the rules of a hold whose process has died, and the table when nothing else uses it. It
/// is no error if they are not there.
pub async fn remove_rules(spec: &HoldSpec) -> Result<()> {
    let mut rules = Rules::open()?;
    let chains = spec.chains();
    tokio::task::spawn_blocking(move || {
        rules.remove(REMOVE, &chains, Vec::new)?;
        rules.remove_unused()
    })
    .await
    .map_err(|_| Error::Thread { doing: REMOVE })?
}
