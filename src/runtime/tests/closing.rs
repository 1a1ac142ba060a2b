//! Tests callers that meet a store that is closing.

use super::*;

fn toys_that_close_slowly(
    disk: &mut dyn Disk,
    options: &Options,
    count: u16,
    now: Micros,
) -> Result<Bootstrap<Toy>> {
    let mut bootstrap = toys(disk, options, count, now)?;
    bootstrap.shards.iter_mut().for_each(|toy| toy.close_us = 100_000);
    Ok(bootstrap)
}

/// If this fails, a close takes as long as its callers like (22 to 42 s were seen): threads that
/// get `Closed` and call again keep the shards busy with refusals, and away from what is left to
/// write.
#[test]
fn callers_who_try_again_take_no_time_from_a_store_that_is_closing() {
    for driver in drivers() {
        let dir = tempfile::tempdir().expect("a directory");
        let options = Options { shards: Some(1), driver, ..Options::default() };
        let runtime = start(&dir, options, toys_that_close_slowly).expect("toys open");
        let ended = AtomicBool::new(false);
        let bootstrap = std::sync::Barrier::new(3);
        let refused = std::thread::scope(|scope| {
            let callers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut refused = 0;
                        bootstrap.wait();
                        while !ended.load(Ordering::SeqCst) {
                            let reply = ask(&runtime, 0, Request::WaitDurable(Lsn::new(1)));
                            refused += u64::from(
                                reply.is_err_and(|error| error.kind() == ErrorKind::Closed),
                            );
                        }
                        refused
                    })
                })
                .collect();
            let mut closing = Box::pin(runtime.handle().close());
            assert!(block_on(poll_once(&mut closing)).is_none(), "it takes a while");
            bootstrap.wait();
            block_on(closing).expect("it closes");
            ended.store(true, Ordering::SeqCst);
            callers.into_iter().map(|caller| caller.join().expect("no caller panics")).sum::<u64>()
        });
        assert!(refused > 1, "{refused} calls came while the store was closing");
        assert_eq!(
            TAKEN_WHILE_CLOSING.load(Ordering::SeqCst),
            0,
            "this many of {refused} reached the shard"
        );
        block_on(runtime.handle().ended());
    }
}
