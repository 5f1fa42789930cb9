//! Keeping a container's packets in the kernel, undelivered and undropped, while it is nowhere.
//!
//! Packets wait in a netfilter queue. Only their numbers come to this process; what is in them
//! stays in the kernel, whole (segments that the network card put together are not cut again). On
//! release they go on, in order, behind the chain that held them: into [`steer`](super::steer),
//! where they meet the mark that their connection has by then.
//!
//! ```text
//! chain new { priority -310: before conntrack
//!   jump hold7_new }
//! chain established { priority -150: after conntrack, before the guard and steering
//!   jump hold7 }
//! chain hold7_new {
//!   SYNs to published ports                                            goto queue7 }
//! chain hold7 {
//!   those SYNs, released                                               return
//!   what came out of the destination's hop from the container's address goto queue7
//!   packets of inbound flows:  direction original, answered by it      goto queue7
//!   packets of outbound flows: direction reply, opened by it           goto queue7
//!   new UDP flows to published ports                                   goto queue7 }
//! chain queue7 { queue flags bypass to 7 }
//! ```
//!
//! What the container itself sends is not held: it is about to be frozen.
//!
//! SYNs are held before conntrack because an entry that is not in the table yet belongs to the one
//! packet that made it; a SYN sent again would clash with the first one when both are released.
//! (UDP flows that begin during a hold may have several packets; their clash is one that the
//! kernel resolves, `nf_ct_resolve_clash`.)
//!
//! # The end of a hold
//! While packets are released others arrive, and queue behind. At some moment the queue has to be
//! left out, and a packet that arrives then must not overtake one that is still in it. Removing
//! the rule cannot do that: it takes effect while packets wait. Instead, one single message to the
//! kernel (a) releases all there is, several times, (b) makes the queue's length zero and lets
//! packets pass a full queue, (c) releases what came in between (a) and (b). Between two parts of
//! it lie microseconds. After that, packets pass the queue without waiting, and the rules can be
//! removed at leisure.
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

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use neli::consts::nl::NlmF;
use neli::consts::socket::{Msg, NlFamily};
use neli::socket::NlSocket;
use rustix::io::Errno;
use rustix::net::sockopt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::published;
use super::ruleset::{self, Rules, add_empty, equal, ip, payload, rule};
use super::wire::{
    self, AF_UNSPEC, NF_ACCEPT, NF_DROP, QUEUE_PACKET, QUEUE_VERDICT, QUEUE_VERDICT_BATCH, nfqa,
    nfqa_cfg,
};
use super::{Error, Result};
use crate::netlink::{self, Attributes, Body, Message, Messages, Request, channel};
use crate::tunnel::HopId;

/// Before conntrack looks (−200), after fragments are put together (−400), at the place of `raw`
/// (−300): `enum nf_ip_hook_priorities` of `linux/netfilter_ipv4.h`.
pub const NEW_PRIORITY: i32 = -310;
/// After conntrack, before [`steer::PRIORITY`](super::steer::PRIORITY).
pub const PRIORITY: i32 = -150;
/// How many packets a hold keeps unless told otherwise. Each takes about 1 KiB of kernel memory
/// for a small packet, up to 64 KiB for one that the network card put together.
pub const DEFAULT_BOUND: u32 = 65_536;
/// How much of what the kernel tells about held packets may wait to be read. A message that finds
/// no room costs its packet.
const RECEIVE_BUFFER: usize = 64 << 20;
/// How many messages are read before orders are looked at.
const READ_AT_ONCE: usize = 1024;

/// A protocol with ports, in the rules of a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortProtocol {
    /// TCP: a new connection is its SYN.
    Tcp,
    /// UDP: a new flow is one that conntrack does not know.
    Udp,
}

/// Ports of this host that are published for the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HeldPorts {
    /// TCP or UDP.
    pub protocol: PortProtocol,
    /// The host's address they are bound to; none for every one of its addresses.
    pub address: Option<IpAddr>,
    /// The first port.
    pub first: u16,
    /// The last port; the first, if it is one.
    pub last: u16,
}

/// How fast held packets are released.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Pace {
    /// As fast as the kernel takes them.
    #[default]
    Unpaced,
}

/// What to hold. It is a value that a journal can keep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldSpec {
    /// The number of the netfilter queue, which no other process of this host may use.
    pub queue: u16,
    /// The container's addresses.
    pub addresses: Vec<IpAddr>,
    /// The ports that are published for it.
    pub ports: Vec<HeldPorts>,
    /// The hop to the destination, so that what the container sends from there waits too, until
    /// the source has let go.
    pub hop: Option<HopId>,
    /// How many packets may wait; more are dropped.
    pub bound: u32,
    /// How fast they are released.
    pub pace: Pace,
}

impl HoldSpec {
    /// A hold of a container's addresses, without ports and hop and with the default bound.
    pub fn new(queue: u16, addresses: Vec<IpAddr>) -> HoldSpec {
        HoldSpec {
            queue,
            addresses,
            ports: Vec::new(),
            hop: None,
            bound: DEFAULT_BOUND,
            pace: Pace::Unpaced,
        }
    }

    fn queue_chain(&self) -> String {
        format!("queue{}", self.queue)
    }

    fn established_chain(&self) -> String {
        format!("hold{}", self.queue)
    }

    fn new_chain(&self) -> String {
        format!("hold{}_new", self.queue)
    }

    /// What jumps goes before what is jumped to.
    fn chains(&self) -> [String; 3] {
        [
            self.new_chain(),
            self.established_chain(),
            self.queue_chain(),
        ]
    }

    fn check(&self) -> Result<()> {
        let what = if self.addresses.is_empty() {
            "the container has no address"
        } else if self.bound == 0 {
            "no packet may wait"
        } else if self.ports.iter().any(|p| p.first == 0 || p.last < p.first) {
            "a range of ports is empty"
        } else {
            return Ok(());
        };
        Err(Error::BadHold { what })
    }

    /// The rules, without the one that queues.
    fn commands(&self) -> Vec<Value> {
        let (queue, established, new) = (
            self.queue_chain(),
            self.established_chain(),
            self.new_chain(),
        );
        let goto = json!({ "goto": { "target": queue } });
        let mut commands = ruleset::base();
        for chain in [&queue, &new, &established] {
            commands.extend(add_empty(chain));
        }
        for (base, chain) in [(ruleset::NEW, &new), (ruleset::ESTABLISHED, &established)] {
            commands.extend(ruleset::jumps(base, chain));
        }
        for (chain, verdict) in [(&new, &goto), (&established, &json!({ "return": null }))] {
            for mut statements in published::matches(&self.ports, PortProtocol::Tcp) {
                statements.insert(
                    0,
                    equal(
                        json!({ "&": [payload("tcp", "flags"), ["syn", "ack"]] }),
                        json!("syn"),
                    ),
                );
                statements.push(verdict.clone());
                commands.push(rule(chain, &statements));
            }
        }
        for address in &self.addresses {
            let ip = ip(address);
            let source = format!("{ip} saddr");
            let ct = |direction| json!({ "ct": { "key": source, "dir": direction } });
            if let Some(hop) = self.hop {
                commands.push(rule(
                    &established,
                    &[
                        equal(
                            json!({ "meta": { "key": "iifname" } }),
                            json!(hop.interface()),
                        ),
                        equal(payload(ip, "saddr"), json!(address)),
                        goto.clone(),
                    ],
                ));
            }
            for (direction, end) in [("original", "reply"), ("reply", "original")] {
                commands.push(rule(
                    &established,
                    &[
                        equal(json!({ "ct": { "key": "direction" } }), json!(direction)),
                        equal(ct(end), json!(address)),
                        goto.clone(),
                    ],
                ));
            }
        }
        for mut statements in published::matches(&self.ports, PortProtocol::Udp) {
            statements.insert(
                0,
                json!({ "match": {
                    "op": "in", "left": { "ct": { "key": "state" } }, "right": "new",
                } }),
            );
            statements.push(goto.clone());
            commands.push(rule(&established, &statements));
        }
        commands
    }
}

/// Where the packets go that were held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum To {
    /// The container runs at the destination: everything goes on, clients' packets by their marks
    /// through the hop, the container's own from the hop to its clients.
    Destination,
    /// The container runs where it was: clients' packets go on, and what came out of the hop is
    /// dropped, for it comes from a copy that does not exist any more.
    Source,
}

/// What a hold did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldReport {
    /// How many packets were held.
    pub held: u64,
    /// How many of them went on.
    pub released: u64,
    /// How many of them were dropped because they came from the destination and the container
    /// stays at the source.
    pub discarded: u64,
    /// How many packets found no room and were dropped.
    pub dropped_by_bound: u64,
    /// The longest that one of them waited.
    pub longest_held: Duration,
    /// The most that waited at the same time.
    pub peak: u64,
}

/// Packets being held. Dropping it releases them to the source.
#[derive(Debug)]
pub struct Hold {
    spec: HoldSpec,
    since: Instant,
    orders: mpsc::UnboundedSender<To>,
    thread: Option<JoinHandle<Result<HoldReport>>>,
    held: Arc<AtomicU64>,
}

impl Hold {
    /// Begins to hold, in the calling thread's network namespace. When this returns, the kernel
    /// holds what arrives.
    pub async fn start(spec: HoldSpec) -> Result<Hold> {
        spec.check()?;
        let queue = Queue::bind(&spec)?;
        let mut rules = Rules::open()?;
        // The queue was free, so if there are such rules their process has died.
        rules.remove(REMOVE, &spec.chains(), Vec::new)?;
        ruleset::apply("set up the rules of a hold", spec.commands()).await?;
        let (orders, received) = mpsc::unbounded_channel();
        let held = Arc::new(AtomicU64::new(0));
        let thread = std::thread::Builder::new()
            .name("livemig-hold".to_owned())
            .spawn({
                let (spec, held) = (spec.clone(), Arc::clone(&held));
                move || work(&spec, queue, received, &held)
            })
            .map_err(|source| socket_error("start the thread of a hold", source))?;
        // From here on, dropping clears everything away.
        let mut hold = Hold {
            spec,
            since: Instant::now(),
            orders,
            thread: Some(thread),
            held,
        };
        // The rules lead to an empty chain so far. This one, put into it, is the switch: it takes
        // effect for both chains at once, without another start of nft.
        hold.since = Instant::now();
        rules.add_queue(&hold.spec.queue_chain(), hold.spec.queue)?;
        Ok(hold)
    }

    /// What is being held.
    pub fn spec(&self) -> &HoldSpec {
        &self.spec
    }

    /// The moment before the first packet could wait.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// How many packets have been held so far.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Releases everything in the order it arrived, then lets packets pass and removes the rules.
    ///
    /// If the returned future is dropped the release goes on to its end all the same.
    pub async fn release(mut self, to: To) -> Result<HoldReport> {
        const DOING: &str = "release packets";
        // If the thread is gone its own error, from joining it, says why.
        let _ = self.orders.send(to);
        let Some(thread) = self.thread.take() else {
            return Err(Error::Thread { doing: DOING });
        };
        tokio::task::spawn_blocking(move || thread.join())
            .await
            .ok()
            .and_then(std::thread::Result::ok)
            .ok_or(Error::Thread { doing: DOING })?
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Packets must not wait for a caller who has gone. This takes milliseconds.
        if let Some(thread) = self.thread.take() {
            let _ = self.orders.send(To::Source);
            match thread.join() {
                Ok(Ok(report)) => tracing::debug!(?report, "a hold was dropped and released"),
                Ok(Err(error)) => tracing::warn!(%error, "a hold was dropped and not released"),
                Err(_) => tracing::warn!("the thread of a hold panicked"),
            }
        }
    }
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

/// What removal of rules says it is doing when it fails.
const REMOVE: &str = "remove the rules of a hold";

fn socket_error(doing: &'static str, source: io::Error) -> Error {
    netlink::Error::Socket { doing, source }.into()
}

/// A packet that waits.
#[derive(Debug, Clone, Copy)]
struct Held {
    id: u32,
    from_hop: bool,
    since: Instant,
}

/// The socket that a netfilter queue is bound to.
struct Queue {
    number: u16,
    socket: NlSocket,
}

impl Queue {
    /// Binds the queue and sets it up. Nothing is sent to it yet.
    fn bind(spec: &HoldSpec) -> Result<Queue> {
        const DOING: &str = "bind a netfilter queue";
        let queue = Queue {
            number: spec.queue,
            socket: channel::open(NlFamily::Netfilter, &[])?,
        };
        let descriptor = channel::borrow(&queue.socket);
        // Beyond net.core.rmem_max only root gets what it asks for.
        if sockopt::set_socket_recv_buffer_size_force(descriptor, RECEIVE_BUFFER).is_err() {
            let _ = sockopt::set_socket_recv_buffer_size(descriptor, RECEIVE_BUFFER);
        }
        let bind = config(spec.queue, |body| {
            body.leaf(nfqa_cfg::CMD, &command(nfqa_cfg::CMD_BIND));
        });
        let set_up = config(spec.queue, |body| {
            // struct nfqnl_msg_config_params: how much of a packet is copied, and the mode.
            let mut parameters = [0u8; 5];
            parameters[4] = nfqa_cfg::COPY_META;
            body.leaf(nfqa_cfg::PARAMS, &parameters)
                .leaf(nfqa_cfg::QUEUE_MAXLEN, &spec.bound.to_be_bytes())
                .leaf(nfqa_cfg::MASK, &nfqa_cfg::F_GSO.to_be_bytes())
                .leaf(nfqa_cfg::FLAGS, &nfqa_cfg::F_GSO.to_be_bytes());
        });
        for request in [bind, set_up] {
            queue.send([request], NlmF::ACK, DOING)?;
            let mut buffer = [0; 4096];
            let (length, _) = queue
                .socket
                .recv(&mut buffer[..], Msg::empty())
                .map_err(|e| socket_error(DOING, e))?;
            for message in Messages::new(&buffer[..length.min(4096)]) {
                match error_number(&message) {
                    None | Some(0) => {}
                    // The kernel's answer for a queue of somebody else's, EPERM or EBUSY.
                    Some(code)
                        if [Errno::PERM, Errno::BUSY].contains(&Errno::from_raw_os_error(code)) =>
                    {
                        return Err(Error::QueueTaken { queue: spec.queue });
                    }
                    Some(code) => {
                        return Err(netlink::Error::Refused {
                            doing: DOING,
                            errno: Errno::from_raw_os_error(code),
                            message: None,
                        }
                        .into());
                    }
                }
            }
        }
        Ok(queue)
    }

    /// Sends messages in one system call, which the kernel works through one after the other.
    fn send(
        &self,
        requests: impl IntoIterator<Item = Request>,
        flags: NlmF,
        doing: &'static str,
    ) -> Result<()> {
        let mut bytes = Vec::new();
        for request in requests {
            request
                .write(1, flags, &mut bytes)
                .map_err(|e| socket_error(doing, e))?;
        }
        self.socket
            .send(&bytes, Msg::empty())
            .map_err(|e| socket_error(doing, e))?;
        Ok(())
    }
}

/// `struct nfqnl_msg_config_cmd`.
fn command(command: u8) -> [u8; 4] {
    [command, 0, 0, 0]
}

/// The number in an acknowledgement: 0, or what went wrong.
fn error_number(message: &Message<'_>) -> Option<i32> {
    if message.kind != u16::from(neli::consts::nl::Nlmsg::Error) {
        return None;
    }
    let code = i32::from_ne_bytes(message.body.get(..4)?.try_into().ok()?);
    Some(code.saturating_neg())
}

/// What the thread of a hold keeps.
struct Keeper<'a> {
    queue: Arc<AsyncFd<NlSocket>>,
    number: u16,
    hop_interface: Option<u32>,
    hop: Option<HopId>,
    waiting: VecDeque<Held>,
    last_id: u32,
    buffer: Vec<u8>,
    report: HoldReport,
    held: &'a AtomicU64,
}

/// The life of a hold's thread: keeps, releases when told, clears away.
fn work(
    spec: &HoldSpec,
    queue: Queue,
    mut orders: mpsc::UnboundedReceiver<To>,
    held: &AtomicU64,
) -> Result<HoldReport> {
    const DOING: &str = "hold packets";
    let number = queue.number;
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(|e| socket_error(DOING, e))
        .and_then(|runtime| {
            runtime.block_on(async {
                let mut keeper = Keeper {
                    queue: Arc::new(
                        channel::register(queue.socket).map_err(|e| socket_error(DOING, e))?,
                    ),
                    number,
                    hop_interface: None,
                    hop: spec.hop,
                    waiting: VecDeque::new(),
                    last_id: 0,
                    buffer: vec![0; 64 * 1024],
                    report: HoldReport::default(),
                    held,
                };
                let to = keeper.keep(&mut orders).await?;
                keeper.release(to)?;
                Ok(keeper)
            })
        });
    // Whatever happened: the rules go. While they do, packets pass the queue, or, if it failed and
    // its socket is closed, bypass it.
    let mut rules = Rules::open();
    let removed = match &mut rules {
        Ok(rules) => rules.remove(REMOVE, &spec.chains(), Vec::new),
        Err(_) => Ok(()),
    };
    ruleset::settle_packets();
    let finished = outcome.and_then(|mut keeper| {
        keeper.finish()?;
        Ok(keeper.report)
    });
    removed?;
    rules?.remove_unused()?;
    finished
}

impl Keeper<'_> {
    /// Notes what arrives until an order comes. Without anybody left to give one: to the source.
    async fn keep(&mut self, orders: &mut mpsc::UnboundedReceiver<To>) -> Result<To> {
        let queue = Arc::clone(&self.queue);
        loop {
            let mut ready = tokio::select! {
                biased;
                order = orders.recv() => return Ok(order.unwrap_or(To::Source)),
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
        while count < READ_AT_ONCE {
            match self
                .queue
                .get_ref()
                .recv(&mut self.buffer[..], Msg::DONTWAIT)
            {
                Ok((length, _)) => {
                    let received = length.min(self.buffer.len());
                    let buffer = std::mem::take(&mut self.buffer);
                    for message in Messages::new(&buffer[..received]) {
                        count += usize::from(self.note(&message));
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
        Ok(count)
    }

    /// Notes one packet. Acknowledgements and errors of verdicts (there was nothing to release)
    /// say nothing.
    fn note(&mut self, message: &Message<'_>) -> bool {
        if message.kind != QUEUE_PACKET {
            return false;
        }
        let (mut id, mut interface) = (None, None);
        for attribute in Attributes::after(message.body, 4) {
            match attribute.kind {
                // struct nfqnl_msg_packet_hdr begins with the packet's number.
                nfqa::PACKET_HDR => id = attribute.be32(),
                nfqa::IFINDEX_INDEV => interface = attribute.be32(),
                _ => {}
            }
        }
        let Some(id) = id else { return false };
        self.last_id = id;
        self.report.held += 1;
        self.held.store(self.report.held, Ordering::Relaxed);
        let from_hop = interface.is_some() && interface == self.hop_interface();
        self.waiting.push_back(Held {
            id,
            from_hop,
            since: Instant::now(),
        });
        self.report.peak = self.report.peak.max(self.waiting.len() as u64);
        true
    }

    /// The number of the hop's interface, which may come up during the hold.
    fn hop_interface(&mut self) -> Option<u32> {
        if self.hop_interface.is_none()
            && let Some(hop) = self.hop
        {
            self.hop_interface = rustix::net::netdevice::name_to_index(
                channel::borrow(self.queue.get_ref()),
                &hop.interface(),
            )
            .ok();
        }
        self.hop_interface
    }

    fn send(&self, requests: Vec<Request>) -> Result<()> {
        const DOING: &str = "release packets";
        let mut bytes = Vec::new();
        for request in requests {
            request
                .write(1, NlmF::empty(), &mut bytes)
                .map_err(|e| socket_error(DOING, e))?;
        }
        match self.queue.get_ref().send(&bytes, Msg::empty()) {
            Ok(_) => Ok(()),
            Err(e) => Err(socket_error(DOING, e)),
        }
    }

    /// Releases what waits, and what arrives meanwhile, until packets pass the queue.
    fn release(&mut self, to: To) -> Result<()> {
        loop {
            while self.read()? == READ_AT_ONCE {}
            if self.waiting.is_empty() {
                break;
            }
            self.release_waiting(to)?;
        }
        // The last message: see the head of this file. The number lies ahead of all that is in
        // the queue, so packets are meant that this process has not read about yet.
        let ahead = self.last_id.wrapping_add(1 << 30);
        let all = || message(self.number, QUEUE_VERDICT_BATCH, NF_ACCEPT, ahead);
        let mut last: Vec<Request> = std::iter::repeat_with(all).take(4).collect();
        last.push(config(self.number, |body| {
            let fail_open = nfqa_cfg::F_FAIL_OPEN.to_be_bytes();
            body.leaf(nfqa_cfg::MASK, &fail_open)
                .leaf(nfqa_cfg::FLAGS, &fail_open);
        }));
        last.push(config(self.number, |body| {
            body.leaf(nfqa_cfg::QUEUE_MAXLEN, &0u32.to_be_bytes());
        }));
        last.extend(std::iter::repeat_with(all).take(2));
        self.send(last)?;
        Ok(())
    }

    /// Gives the packets that are noted their verdicts, in order.
    fn release_waiting(&mut self, to: To) -> Result<()> {
        let mut verdicts = Vec::new();
        let mut accept = None;
        for held in &self.waiting {
            if held.from_hop && to == To::Source {
                if let Some(id) = accept.take() {
                    verdicts.push(message(self.number, QUEUE_VERDICT_BATCH, NF_ACCEPT, id));
                }
                verdicts.push(message(self.number, QUEUE_VERDICT, NF_DROP, held.id));
                self.report.discarded += 1;
            } else {
                accept = Some(held.id);
                self.report.released += 1;
            }
        }
        if let Some(id) = accept {
            verdicts.push(message(self.number, QUEUE_VERDICT_BATCH, NF_ACCEPT, id));
        }
        // A message to the kernel is bounded by the socket's send buffer.
        let mut verdicts = verdicts.into_iter().peekable();
        while verdicts.peek().is_some() {
            self.send(verdicts.by_ref().take(256).collect())?;
        }
        self.settle();
        Ok(())
    }

    /// Takes note that all that waited waits no more.
    fn settle(&mut self) {
        let now = Instant::now();
        for held in self.waiting.drain(..) {
            let waited = now.saturating_duration_since(held.since);
            self.report.longest_held = self.report.longest_held.max(waited);
        }
    }

    /// Once no rule leads to the queue any more: counts what went by unread, and unbinds.
    fn finish(&mut self) -> Result<()> {
        let ahead = self.last_id.wrapping_add(1 << 30);
        self.send(vec![message(
            self.number,
            QUEUE_VERDICT_BATCH,
            NF_ACCEPT,
            ahead,
        )])?;
        while self.read()? == READ_AT_ONCE {}
        self.report.released += self.waiting.len() as u64;
        self.settle();
        self.report.dropped_by_bound = dropped(self.number);
        self.send(vec![config(self.number, |body| {
            body.leaf(nfqa_cfg::CMD, &command(nfqa_cfg::CMD_UNBIND));
        })])
    }
}

/// A verdict on one packet (`QUEUE_VERDICT`), or on all up to it (`QUEUE_VERDICT_BATCH`).
fn message(queue: u16, kind: u16, verdict: u32, id: u32) -> Request {
    let mut header = [0u8; 8];
    header[..4].copy_from_slice(&verdict.to_be_bytes());
    header[4..].copy_from_slice(&id.to_be_bytes());
    let mut body = Body::netfilter(AF_UNSPEC, queue);
    body.leaf(nfqa::VERDICT_HDR, &header);
    Request::new(kind, body)
}

fn config(queue: u16, fill: impl FnOnce(&mut Body)) -> Request {
    let mut body = Body::netfilter(AF_UNSPEC, queue);
    fill(&mut body);
    Request::new(wire::QUEUE_CONFIG, body)
}

/// How many packets a queue has dropped: for its bound, and for want of room in the socket.
/// The sixth and seventh column of the file (`seq_show` in `net/netfilter/nfnetlink_queue.c`).
fn dropped(queue: u16) -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue")
    else {
        return 0;
    };
    text.lines()
        .map(|line| -> Vec<u64> {
            line.split_whitespace()
                .map(|field| field.parse().unwrap_or(0))
                .collect()
        })
        .find(|fields| fields.first() == Some(&u64::from(queue)))
        .map_or(0, |fields| fields.iter().skip(5).take(2).sum())
}
