package keyturn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
)

// A Call is one request from its decision to its record. [Client.Request] makes it; it ends with Finish or Close, and what is
// recorded then is
//
//   - the outcome given with Failed, whatever else was said;
//   - else SUCCESS, where Succeeded was called, and by Finish;
//   - else CLIENT_CANCELLED with what was noted, where the request had gone out, and NEVER_SENT where it had not.
//
// The request has gone out once Headers or Secret was taken, or Sending, Used or Cost was called. A call that ended is
// ErrEnded for everything but reading. An unmetered call records nothing.
//
// A Call is safe for many goroutines: one may note usage while another closes it.
type Call struct {
	client  *Client
	timeout time.Duration
	owned   bool // the request id was made here

	mu         sync.Mutex
	state      callState
	request    DecideRequest
	decision   *Decision
	goneOut    bool
	succeeded  bool
	noted      RecordRequest // Outcome: that of Failed
	unrecorded *RecordRequest
}

type callState int

const (
	open     callState = iota
	deciding           // the own key was refused, and there is no new decision yet
	ended
)

// Request decides, and opens a call where the request may go ahead. It is a *DeniedError where the policy says no. The
// options hold for each of the call's own calls. End it with Finish, or in any case with
//
//	defer call.Close()
func (c *Client) Request(ctx context.Context, request DecideRequest, options ...CallOption) (*Call, error) {
	timeout, err := c.begin(options)
	if err != nil {
		return nil, err
	}
	request.Redeem = false // a call has the secret at hand
	call := &Call{client: c, timeout: timeout, owned: request.RequestID == "", request: request}
	if call.owned {
		call.request.RequestID = newRequestID()
	}
	call.decision, err = call.decide(ctx)
	if err != nil {
		return nil, err
	}
	return call, nil
}

func (c *Call) decide(ctx context.Context) (*Decision, error) {
	decision, err := c.client.decide(ctx, c.request, c.owned, c.timeout)
	if err == nil && !decision.Allowed() {
		return nil, &DeniedError{Decision: decision}
	}
	return decision, err
}

// RequestID returns the id that makes a repeated decision find the first hold.
func (c *Call) RequestID() string { return c.request.RequestID }

// Decision returns the decision in force: the latest, after KeyRefused.
func (c *Call) Decision() *Decision {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.decision
}

// Key returns the user's own key when that pays, else nil.
func (c *Call) Key() *KeyHandle { return c.Decision().Key }

// Ticket returns the hold on the user's credits when those pay, else nil.
func (c *Call) Ticket() *CreditTicket { return c.Decision().Ticket }

// Unrecorded returns the record that Finish could not get through, for [Client.RecordLater]; else nil.
func (c *Call) Unrecorded() *RecordRequest {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.unrecorded
}

// String returns the request id and the decision in force.
func (c *Call) String() string {
	return fmt.Sprintf("keyturn.Call(%s %v)", c.RequestID(), c.Decision())
}

// Format writes what String returns, for every verb.
func (c *Call) Format(state fmt.State, _ rune) { write(state, c.String()) }

// LogValue returns what String returns.
func (c *Call) LogValue() slog.Value { return slog.StringValue(c.String()) }

// Headers returns the headers that sign the request: the own key's, or a copy of platform when credits pay. The request goes
// out now. They hold a secret: never log them.
func (c *Call) Headers(platform map[string]string) (map[string]string, error) {
	key, err := c.takeKey()
	if err != nil {
		return nil, err
	}
	if key != nil {
		return key.Headers()
	}
	return maps.Clone(platform), nil
}

// Secret returns the own key's secret, for libraries that sign by themselves; nil when credits pay. The request goes out now.
func (c *Call) Secret() (*Secret, error) {
	key, err := c.takeKey()
	if err != nil || key == nil {
		return nil, err
	}
	return key.Secret, nil
}

// takeKey is the own key, or nil, for a request that goes out now.
func (c *Call) takeKey() (*KeyHandle, error) {
	var key *KeyHandle
	err := c.sending(func() { key = c.decision.Key })
	return key, err
}

// Sending says that the request goes out now; for callers that need neither Headers nor Secret.
func (c *Call) Sending() error { return c.sending(func() {}) }

// Used notes tokens used. A count given again replaces the earlier one; the others stay.
func (c *Call) Used(usage Usage) error {
	return c.sending(func() {
		sum := given(c.noted.Usage, &Usage{})
		c.noted.Usage = &Usage{
			InputTokens:      given(usage.InputTokens, sum.InputTokens),
			OutputTokens:     given(usage.OutputTokens, sum.OutputTokens),
			CacheReadTokens:  given(usage.CacheReadTokens, sum.CacheReadTokens),
			CacheWriteTokens: given(usage.CacheWriteTokens, sum.CacheWriteTokens),
			TotalTokens:      given(usage.TotalTokens, sum.TotalTokens),
		}
	})
}

// Cost notes what the request cost, in micros. It wins over tokens.
func (c *Call) Cost(micros int64) error { return c.sending(func() { c.noted.CostMicros = &micros }) }

// A Note is what else is known of a request. What is zero says nothing.
type Note struct {
	// Model is the model that answered.
	Model string
	// Endpoint is the provider's, e.g. /v1/chat/completions.
	Endpoint string
	// ResponseTime is how long the provider took.
	ResponseTime time.Duration
	HTTPStatus   int
}

// Note notes what else is known.
func (c *Call) Note(note Note) error {
	return c.whileOpen(func() {
		c.noted.Model = given(note.Model, c.noted.Model)
		c.noted.Endpoint = given(note.Endpoint, c.noted.Endpoint)
		c.noted.ResponseTime = given(note.ResponseTime, c.noted.ResponseTime)
		c.noted.HTTPStatus = given(note.HTTPStatus, c.noted.HTTPStatus)
	})
}

// Succeeded says that the provider answered.
func (c *Call) Succeeded() error { return c.whileOpen(func() { c.succeeded = true }) }

// A Failure says how a request ended that did not succeed. All but the outcome is optional.
type Failure struct {
	Outcome      Outcome
	HTTPStatus   int
	ErrorMessage string
	// RetryAfter is how long the provider asked to wait; nil when it did not.
	RetryAfter *time.Duration
}

// Failed says how the request ended. It is ErrInvalid for SUCCESS, which is what Succeeded is for.
func (c *Call) Failed(failure Failure) error {
	switch failure.Outcome {
	case OutcomeSuccess:
		return invalid("SUCCESS is no failure: call Succeeded")
	case OutcomeUnspecified:
		return invalid("the Outcome of the failure is missing")
	}
	return c.whileOpen(func() { c.fail(failure) })
}

func (c *Call) fail(failure Failure) {
	c.noted.Outcome = failure.Outcome
	c.noted.HTTPStatus = given(failure.HTTPStatus, c.noted.HTTPStatus)
	c.noted.ErrorMessage = failure.ErrorMessage
	c.noted.RetryAfter = failure.RetryAfter
}

// KeyRefused records that the provider refused the own key, and decides again without it, with the same request id. Then a new
// decision is in force, with nothing noted; it is a *DeniedError when nobody else may pay. Without an Outcome the key was
// AUTH_REJECTED with the HTTP status 401.
//
// When the record does not get through, the call goes on with the old decision, and its end records the refusal.
func (c *Call) KeyRefused(ctx context.Context, failure Failure) error {
	if failure.Outcome == OutcomeSuccess {
		return invalid("SUCCESS refuses no key")
	}
	if failure.Outcome == OutcomeUnspecified || failure.Outcome == OutcomeAuthRejected {
		failure.Outcome = OutcomeAuthRejected
		failure.HTTPStatus = given(failure.HTTPStatus, 401)
	}
	var refusal RecordRequest
	var refused *KeyHandle
	err := c.whileOpen(func() {
		if refused = c.decision.Key; refused != nil {
			c.fail(failure)
			refusal = c.record()
		}
	})
	switch {
	case err != nil:
		return err
	case refused == nil:
		return invalid("credits pay for this call: there is no own key to refuse")
	}
	_, err = c.client.Record(ctx, refusal, WithTimeout(c.timeout))
	switch {
	case errors.Is(err, context.Canceled): // it is carried on in the background
		c.end()
		return err
	case err != nil:
		return err
	}
	if err := c.whileOpen(func() {
		c.state = deciding
		c.request.FailedKeys = append(slices.Clip(c.request.FailedKeys), refused.Handle)
	}); err != nil {
		return err
	}
	decision, err := c.decide(ctx)
	if err != nil {
		c.end()
		return err
	}
	if !c.take(decision) {
		if decision.Ticket != nil {
			c.client.outbox.pushOrReport(RecordRequest{Settles: decision, Outcome: OutcomeNeverSent})
		}
		return ErrEnded
	}
	return nil
}

// take puts a new decision in force, with nothing noted about it; false when another goroutine ended the call meanwhile.
func (c *Call) take(decision *Decision) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == ended {
		return false
	}
	c.state, c.decision = open, decision
	c.goneOut, c.succeeded, c.noted = false, false, RecordRequest{}
	return true
}

// Finish ends the call as a success, unless Failed was called, records it, and returns the record as it was taken: nil for an
// unmetered call. When ctx is canceled meanwhile, the record is carried on in the background. After any other error
// Unrecorded is the record, to try again.
func (c *Call) Finish(ctx context.Context) (*Recorded, error) {
	var record RecordRequest
	unmetered := false
	if err := c.whileOpen(func() {
		c.state, c.succeeded = ended, true
		record, unmetered = c.record(), c.decision.Unmetered
	}); err != nil || unmetered {
		return nil, err
	}
	recorded, err := c.client.Record(ctx, record, WithTimeout(c.timeout))
	if err != nil && !errors.Is(err, context.Canceled) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.unrecorded = &record
	}
	return recorded, err
}

// Close ends the call, unless it has ended, and hands its record to the background.
func (c *Call) Close() {
	c.mu.Lock()
	was := c.state
	record, unmetered := c.record(), c.decision.Unmetered
	c.state = ended
	c.mu.Unlock()
	if was == open && !unmetered {
		c.client.outbox.pushOrReport(record)
	}
}

// record is what there is to record. The lock is held.
func (c *Call) record() RecordRequest {
	record := c.noted
	record.Settles = c.decision
	switch {
	case record.Outcome != OutcomeUnspecified:
	case c.succeeded:
		record.Outcome = OutcomeSuccess
	case c.goneOut:
		record.Outcome = OutcomeClientCancelled
	default:
		record.Outcome = OutcomeNeverSent
	}
	return record
}

// whileOpen does something to an open call.
func (c *Call) whileOpen(do func()) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != open {
		return ErrEnded
	}
	do()
	return nil
}

// sending does something to an open call whose request goes out now.
func (c *Call) sending(do func()) error {
	return c.whileOpen(func() {
		c.goneOut = true
		do()
	})
}

func (c *Call) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state = ended
}
