//! The thread of a hold: it notes what waits, lets it go when told, and clears away.
//!
//! Within a flow the order never changes: all of a flow's packets have the same protocol, and each
//! of the lists here is let go from its front.

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use neli::consts::nl::NlmF;
use neli::consts::socket::Msg;
use neli::socket::NlSocket;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::pace::{Pace, Pacer};
use super::queue::{self, Notice, Queue, command, config, socket_error, verdict};
use super::report::{HoldReport, To};
use super::spec::HoldSpec;
use crate::conntrack::Result;
use crate::conntrack::ruleset::{self, Rules};
use crate::conntrack::wire::{NF_ACCEPT, NF_DROP, QUEUE_VERDICT, QUEUE_VERDICT_BATCH, nfqa_cfg};
use crate::netlink::{Messages, Request, channel};

/// How many messages are read before orders are looked at.
const READ_AT_ONCE: usize = 1024;
/// How many verdicts are sent at once: a message to the kernel is bounded by the send buffer.
const VERDICTS_AT_ONCE: usize = 256;
/// How often all there is is let go in the last message of a release. Each time takes care of what
/// has come during the one before, which at any rate that the host can carry is less.
const SWEEPS: usize = 16;
/// If for so long datagrams that wait do not become fewer, their pace is given up.
const PACED_FOR: Duration = Duration::from_secs(5);
/// How long packets that come out of a hop are let in at a pace without a word that they were the
/// last.
const UNFINISHED_FOR: Duration = Duration::from_secs(10);

/// What removal of rules says it is doing when it fails.
pub(super) const REMOVE: &str = "remove the rules of a hold";
const DOING: &str = "hold packets";
const RELEASE: &str = "release packets";

/// What a keeper is told.
#[derive(Debug)]
pub(super) enum Order {
    /// Let go. Told a second time, the second one counts.
    Release(Terms),
    /// Nothing more comes out of the hop.
    Finish,
}

/// How packets are to be let go.
#[derive(Debug)]
pub(super) struct Terms {
    pub to: To,
    pub pace: Pace,
    /// Whether there is an [`Order::Finish`] to come, before which it does not end.
    pub until_finish: bool,
}

/// What others may know of a hold at any time.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    /// How many packets were held so far.
    pub held: AtomicU64,
    /// Cancelled as soon as no more packets can wait.
    pub full: CancellationToken,
}

/// A packet that waits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    id: u32,
    /// In bytes.
    pub(super) length: u32,
    /// It is several that were put together.
    pub(super) together: bool,
    udp: bool,
    /// The container's own address is its source.
    own: bool,
    since: Instant,
}

/// What the thread of a hold keeps.
struct Keeper<'a> {
    spec: &'a HoldSpec,
    queue: Arc<AsyncFd<NlSocket>>,
    number: u16,
    /// Noted, and not looked at yet.
    waiting: VecDeque<Held>,
    /// Waits for its turn.
    paced: VecDeque<Held>,
    bytes: u64,
    first_udp: Option<Instant>,
    udp: u64,
    last_id: u32,
    buffer: Vec<u8>,
    report: HoldReport,
    gauge: &'a Gauge,
}

/// The life of a hold's thread: keeps, releases when told, says so, clears away.
pub(super) fn work(
    spec: &HoldSpec,
    queue: Queue,
    mut orders: mpsc::UnboundedReceiver<Order>,
    passed: oneshot::Sender<Instant>,
    gauge: &Gauge,
) -> Result<HoldReport> {
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|e| socket_error(DOING, e))
        .and_then(|runtime| {
            runtime.block_on(async {
                let mut keeper = Keeper::new(spec, queue, gauge)?;
                let terms = keeper.keep(&mut orders).await?;
                let began = keeper.release(terms, &mut orders).await?;
                Ok((keeper, began))
            })
        });
    if let Ok((_, began)) = &outcome {
        // Nobody may be waiting for it.
        let _ = passed.send(*began);
    }
    // Whatever happened: the rules go. While they do, packets pass the queue, or, if it failed and
    // its socket is closed, bypass it.
    let mut rules = Rules::open();
    let removed = match &mut rules {
        Ok(rules) => rules.remove(REMOVE, &spec.chains(), Vec::new),
        Err(_) => Ok(()),
    };
    ruleset::settle_packets();
    let finished = outcome.and_then(|(mut keeper, _)| {
        keeper.finish()?;
        Ok(keeper.report)
    });
    removed?;
    rules?.remove_unused()?;
    finished
}

impl<'a> Keeper<'a> {
    fn new(spec: &'a HoldSpec, queue: Queue, gauge: &'a Gauge) -> Result<Keeper<'a>> {
        let number = queue.number;
        let socket = channel::register(queue.socket).map_err(|e| socket_error(DOING, e))?;
        Ok(Keeper {
            spec,
            queue: Arc::new(socket),
            number,
            waiting: VecDeque::new(),
            paced: VecDeque::new(),
            bytes: 0,
            first_udp: None,
            udp: 0,
            last_id: 0,
            buffer: vec![0; 64 * 1024],
            report: HoldReport::default(),
            gauge,
        })
    }

    /// Notes what arrives until an order comes. Without anybody left to give one: to the source.
    async fn keep(&mut self, orders: &mut mpsc::UnboundedReceiver<Order>) -> Result<Terms> {
        let queue = Arc::clone(&self.queue);
        loop {
            let mut ready = tokio::select! {
                biased;
                order = orders.recv() => match order {
                    // There is nothing to end yet.
                    Some(Order::Finish) => continue,
                    Some(Order::Release(terms)) => return Ok(terms),
                    None => return Ok(ABANDONED),
                },
                ready = queue.readable() => {
                    ready.map_err(|e| socket_error("read a netfilter queue", e))?
                }
            };
            if self.read()? < READ_AT_ONCE {
                ready.clear_ready();
            }
        }
    }

    /// Reads what the kernel tells about packets, without waiting; returns how many there were.
    fn read(&mut self) -> Result<usize> {
        let mut count = 0;
        let mut too_many = Vec::new();
        while count < READ_AT_ONCE {
            match self
                .queue
                .get_ref()
                .recv(&mut self.buffer[..], Msg::DONTWAIT)
            {
                Ok((length, _)) => {
                    let received = length.min(self.buffer.len());
                    let buffer = std::mem::take(&mut self.buffer);
                    for notice in Messages::new(&buffer[..received])
                        .filter_map(|message| Notice::read(&message))
                    {
                        count += 1;
                        self.note(&notice, &mut too_many);
                    }
                    self.buffer = buffer;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // Interrupted, or the buffer was too small for a burst: the kernel has counted
                // the packets it dropped for that.
                Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::INTR | Errno::NOBUFS)) => {
                }
                Err(e) => return Err(socket_error("read a netfilter queue", e)),
            }
        }
        self.send_all(too_many)?;
        Ok(count)
    }

    /// Notes one packet, or has it dropped if there is no room for its bytes.
    fn note(&mut self, notice: &Notice, too_many: &mut Vec<Request>) {
        self.last_id = notice.id;
        let bytes = self.bytes + u64::from(notice.length);
        if bytes > self.spec.bytes {
            self.report.dropped_by_bound += 1;
            self.gauge.full.cancel();
            too_many.push(verdict(self.number, QUEUE_VERDICT, NF_DROP, notice.id));
            return;
        }
        let now = Instant::now();
        self.bytes = bytes;
        self.report.held += 1;
        self.gauge.held.store(self.report.held, Ordering::Relaxed);
        let udp = notice.header.is_udp();
        if udp {
            self.udp += 1;
            self.first_udp.get_or_insert(now);
        }
        let own = |source: IpAddr| self.spec.addresses.contains(&source);
        let own = notice.header.source.is_some_and(own);
        self.waiting.push_back(Held {
            id: notice.id,
            length: notice.length,
            together: notice.together,
            udp,
            own,
            since: now,
        });
        let packets = self.waiting.len() + self.paced.len();
        self.report.peak = self.report.peak.max(packets as u64);
        self.report.peak_bytes = self.report.peak_bytes.max(bytes);
        if packets >= self.spec.packets as usize {
            self.gauge.full.cancel();
        }
    }

    fn send(&self, requests: impl IntoIterator<Item = Request>) -> Result<()> {
        let mut bytes = Vec::new();
        for request in requests {
            request
                .write(1, NlmF::empty(), &mut bytes)
                .map_err(|e| socket_error(RELEASE, e))?;
        }
        match self.queue.get_ref().send(&bytes, Msg::empty()) {
            Ok(_) => Ok(()),
            Err(e) => Err(socket_error(RELEASE, e)),
        }
    }

    fn send_all(&self, requests: Vec<Request>) -> Result<()> {
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            self.send(requests.by_ref().take(VERDICTS_AT_ONCE))?;
        }
        Ok(())
    }

    /// Lets go what waits, and what arrives meanwhile, until packets pass the queue. Returns when the first had gone.
    async fn release(
        &mut self,
        terms: Terms,
        orders: &mut mpsc::UnboundedReceiver<Order>,
    ) -> Result<Instant> {
        let queue = Arc::clone(&self.queue);
        let began = Instant::now();
        let mut first = None;
        let mut course = Course::begin(self, &terms)?;
        let (mut fewest, mut since) = (usize::MAX, began);
        loop {
            loop {
                match orders.try_recv() {
                    Ok(Order::Finish) => course.finished = true,
                    Ok(Order::Release(terms)) => course = Course::begin(self, &terms)?,
                    Err(mpsc::error::TryRecvError::Disconnected) if !course.finished => {
                        course = Course::begin(self, &ABANDONED)?;
                    }
                    Err(_) => break,
                }
            }
            if began.elapsed() >= UNFINISHED_FOR {
                course.finished = true;
            }
            // Where they come faster than they can be noted, this must not go on for ever.
            let mut notices = 0;
            while notices < self.spec.packets as usize {
                let more = self.read()?;
                notices += more;
                if more < READ_AT_ONCE {
                    break;
                }
            }
            self.sort(course.to, course.pacer.is_paced())?;
            let portion = course.pacer.portion(&self.paced)?;
            let own = self.let_go(portion)?;
            first.get_or_insert_with(Instant::now);
            course.pacer.gone(portion, own);

            if self.paced.is_empty() {
                (fewest, since) = (usize::MAX, Instant::now());
                // At a high rate there is no moment in which none come: a few go in the end without
                // having been looked at.
                if course.finished {
                    break;
                }
                if self.read()? > 0 {
                    continue;
                }
                // Nothing to do until something happens; a bound on time may be that.
                let _ = tokio::time::timeout(Duration::from_millis(5), async {
                    if let Ok(mut ready) = queue.readable().await {
                        ready.clear_ready();
                    }
                })
                .await;
            } else {
                if self.paced.len() < fewest {
                    (fewest, since) = (self.paced.len(), Instant::now());
                }
                if since.elapsed() >= PACED_FOR {
                    tracing::warn!(
                        waiting = self.paced.len(),
                        "datagrams arrive as fast as they are let go: letting all go"
                    );
                    self.report.gave_up_pace = true;
                    course.pacer = Pacer::Unpaced;
                }
                std::thread::sleep(course.pacer.tick());
            }
        }
        self.let_pass()?;
        self.report.release = began.elapsed();
        Ok(first.unwrap_or(began))
    }

    /// The last message: see the head of [`hold`](super). The number lies ahead of all that is in
    /// the queue, so packets are meant that this process has not read about yet.
    fn let_pass(&mut self) -> Result<()> {
        let ahead = self.last_id.wrapping_add(1 << 30);
        let all = || verdict(self.number, QUEUE_VERDICT_BATCH, NF_ACCEPT, ahead);
        let mut last: Vec<Request> = std::iter::repeat_with(all).take(SWEEPS).collect();
        last.push(config(self.number, |body| {
            let fail_open = nfqa_cfg::F_FAIL_OPEN.to_be_bytes();
            body.leaf(nfqa_cfg::MASK, &fail_open)
                .leaf(nfqa_cfg::FLAGS, &fail_open);
        }));
        last.push(config(self.number, |body| {
            body.leaf(nfqa_cfg::QUEUE_MAXLEN, &0u32.to_be_bytes());
        }));
        last.extend(std::iter::repeat_with(all).take(2));
        self.send(last)
    }

    /// Decides about what has been noted: what does not have to wait for its turn goes, in order.
    fn sort(&mut self, to: To, paced: bool) -> Result<()> {
        let now = Instant::now();
        let mut verdicts = Vec::new();
        // All up to this number go with one verdict, as long as none of them has to wait.
        let mut run = None;
        for held in std::mem::take(&mut self.waiting) {
            if held.own && to == To::Source {
                verdicts.push(verdict(self.number, QUEUE_VERDICT, NF_DROP, held.id));
                self.report.discarded += 1;
                self.left(&held, now);
            } else if held.udp && paced {
                self.paced.push_back(held);
            } else {
                if self.paced.is_empty() {
                    run = Some(held.id);
                } else {
                    verdicts.extend(
                        run.take()
                            .map(|id| verdict(self.number, QUEUE_VERDICT_BATCH, NF_ACCEPT, id)),
                    );
                    verdicts.push(verdict(self.number, QUEUE_VERDICT, NF_ACCEPT, held.id));
                }
                self.report.released += 1;
                self.left(&held, now);
            }
        }
        verdicts.extend(run.map(|id| verdict(self.number, QUEUE_VERDICT_BATCH, NF_ACCEPT, id)));
        self.send_all(verdicts)
    }

    /// Lets go so many of those that wait for their turn, and returns how many of them came from the
    /// container.
    fn let_go(&mut self, packets: usize) -> Result<usize> {
        let now = Instant::now();
        let gone: Vec<Held> = self.paced.drain(..packets.min(self.paced.len())).collect();
        let Some(newest) = gone.last() else {
            return Ok(0);
        };
        // Everything with a lower number has gone before, or goes with it.
        self.send([verdict(
            self.number,
            QUEUE_VERDICT_BATCH,
            NF_ACCEPT,
            newest.id,
        )])?;
        self.report.released += gone.len() as u64;
        for held in &gone {
            self.left(held, now);
        }
        Ok(gone.iter().filter(|held| held.own).count())
    }

    /// Takes note that a packet waits no more.
    fn left(&mut self, held: &Held, now: Instant) {
        let waited = now.saturating_duration_since(held.since);
        self.report.longest_held = self.report.longest_held.max(waited);
        self.bytes = self.bytes.saturating_sub(u64::from(held.length));
    }

    /// The rate at which datagrams have been arriving, in packets a second.
    fn arrival(&self) -> f64 {
        let Some(first) = self.first_udp else {
            return 0.0;
        };
        // In the first milliseconds a rate is chance.
        self.udp as f64 / first.elapsed().as_secs_f64().max(0.01)
    }

    /// Once no rule leads to the queue any more: counts what went by unread, and unbinds.
    fn finish(&mut self) -> Result<()> {
        let ahead = self.last_id.wrapping_add(1 << 30);
        self.send([verdict(self.number, QUEUE_VERDICT_BATCH, NF_ACCEPT, ahead)])?;
        while self.read()? == READ_AT_ONCE {}
        let now = Instant::now();
        for held in std::mem::take(&mut self.waiting) {
            self.report.released += 1;
            self.left(&held, now);
        }
        self.report.dropped_by_bound += queue::dropped(self.number);
        self.send([config(self.number, |body| {
            body.leaf(nfqa_cfg::CMD, &command(nfqa_cfg::CMD_UNBIND));
        })])
    }
}

/// What is done when nobody is left to say what to do.
const ABANDONED: Terms = Terms {
    to: To::Source,
    pace: Pace::Unpaced,
    until_finish: false,
};

/// How packets are being let go.
struct Course {
    to: To,
    pacer: Pacer,
    /// Whether nothing more is to be waited for.
    finished: bool,
}

impl Course {
    fn begin(keeper: &mut Keeper<'_>, terms: &Terms) -> Result<Course> {
        let to = terms.to;
        // What was sorted before is sorted again: it may go elsewhere now.
        let mut again: Vec<Held> = keeper.paced.drain(..).collect();
        again.extend(keeper.waiting.drain(..));
        keeper.waiting = again.into();
        let hop = keeper.spec.hop.map(|hop| hop.interface());
        let hop = hop.filter(|_| to == To::Destination);
        Ok(Course {
            to,
            pacer: Pacer::new(&terms.pace, keeper.arrival(), hop)?,
            finished: !terms.until_finish,
        })
    }
}
