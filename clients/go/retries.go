package keyturn

import (
	"math/rand/v2"
	"time"
)

// Retries is exponential backoff with full jitter, for UNAVAILABLE alone, within the deadline of a call. It is the one
// retry policy: grpc's own is off. A field that is 0 has its default.
//
// Before attempt n+1 the client waits a random time up to FirstDelay * 2^(n-1), at most MaxDelay, on top of the time
// that the sidecar asked to wait. A wait that does not fit in the deadline is not begun.
type Retries struct {
	// Attempts is how many there are at most. 1: none is repeated. Default: 5.
	Attempts int
	// FirstDelay is the longest wait before the second attempt. Default: 100 ms.
	FirstDelay time.Duration
	// MaxDelay is the longest wait of all, apart from what the sidecar asks for. Default: 1 s.
	MaxDelay time.Duration
}

func (r Retries) withDefaults() Retries {
	r.Attempts = given(r.Attempts, 5)
	r.FirstDelay = given(r.FirstDelay, 100*time.Millisecond)
	r.MaxDelay = given(r.MaxDelay, time.Second)
	return r
}

// given is the value, or where it is zero its default.
func given[T comparable](value, otherwise T) T {
	var zero T
	if value == zero {
		return otherwise
	}
	return value
}

// jitter is the random part of the wait after the given number of attempts.
func (r Retries) jitter(made int) time.Duration {
	longest := r.MaxDelay
	if doubled := r.FirstDelay << min(made-1, 30); doubled>>min(made-1, 30) == r.FirstDelay {
		longest = min(doubled, r.MaxDelay)
	}
	return rand.N(longest + 1)
}

// fit is how long to wait before the next attempt, of which asked is what the sidecar wants; false when no wait fits
// in what is left of the deadline. Jitter gives way to the deadline; what the sidecar asked for does not.
func fit(asked, jitter, left time.Duration) (time.Duration, bool) {
	switch {
	case asked+jitter < left:
		return asked + jitter, true
	case 0 < asked && asked < left:
		return asked, true
	}
	return 0, false
}
