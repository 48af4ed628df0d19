package keyturn

import (
	"fmt"
	"time"
)

// A DecideRequest is one request that a gateway is about to make for a user.
type DecideRequest struct {
	UserID string
	// Provider is an id in api_providers, e.g. openai.
	Provider string
	// Model is the provider's name of the model; it prices the estimate.
	Model string
	// ServiceType is a label for reports, e.g. copilot.
	ServiceType string
	// RequestID: the same id of the same user never places a second hold. Empty: the client makes a new one.
	RequestID string
	// CostMicros estimates by a cost, in micros. With neither a cost nor tokens: the sidecar's default hold.
	CostMicros *int64
	// InputTokens and MaxOutputTokens estimate by tokens, priced by Model. Not together with CostMicros.
	InputTokens     *int64
	MaxOutputTokens *int64
	Constraint      Constraint
	// FailedKeys are handles of earlier decisions of this request that the provider refused: they are left out.
	FailedKeys []SealedHandle
	// Redeem leaves the secret out of the answer: fetch it once with Client.Redeem. Request pays no heed to it.
	Redeem bool
	// HoldTTL is how long the hold or the handle lives, 1 s to 24 h. 0: the sidecar's 10 minutes.
	HoldTTL time.Duration
}

// A Decision says whose credential pays: one of Key, Ticket and Denial is set.
//
// None of them is when it is Unmetered, or when a newer sidecar answers with a route that this client does not know;
// that one is not Allowed either.
type Decision struct {
	DecisionID string
	Mode       Mode
	Reason     Reason
	// Message is one plain sentence for logs and support.
	Message string
	// Degraded: made from cached data, because the database could not be asked.
	Degraded bool
	// Replayed: the request id was seen before, and this is its first ticket again.
	Replayed bool
	// Unmetered: the sidecar is down, and Options.WhenDown let the request go ahead on the platform's own credential.
	Unmetered bool
	Key       *KeyHandle
	Ticket    *CreditTicket
	Denial    *Denial
}

// Allowed reports whether the request may go ahead.
func (d *Decision) Allowed() bool { return d.Key != nil || d.Ticket != nil || d.Unmetered }

// String says what was decided in a line that is fit for logs.
func (d Decision) String() string {
	route := "no known route"
	switch {
	case d.Key != nil:
		route = d.Key.Handle.String()
	case d.Ticket != nil:
		route = d.Ticket.Ticket.String()
	case d.Denial != nil:
		route = d.Denial.Reason.String()
	case d.Unmetered:
		return "Decision(unmetered)"
	}
	return fmt.Sprintf("Decision(%s %v %v %s)", d.DecisionID, d.Mode, d.Reason, route)
}

// A KeyHandle is the user's own key for one request.
type KeyHandle struct {
	Handle   SealedHandle
	KeyID    string
	Provider string
	// Hint is the last four characters of the secret, to show to its owner.
	Hint string
	// Secret is nil when it was asked for with DecideRequest.Redeem: fetch it with Client.Redeem.
	Secret     *Secret
	AuthHeader string
	AuthPrefix string
	// BaseURL is where the provider's API is, e.g. https://api.openai.com/v1.
	BaseURL string
	// ExpireTime is until when it may be redeemed; a record is taken 7 days longer. Zero in an explanation.
	ExpireTime time.Time
}

// Headers returns the one header that signs a request with this key. It holds the secret: never log it.
//
// It is ErrInvalid when the secret was not delivered with the decision.
func (k *KeyHandle) Headers() (map[string]string, error) {
	if k.Secret == nil {
		return nil, invalid("the secret is not here: fetch it once with Redeem")
	}
	return map[string]string{k.AuthHeader: k.AuthPrefix + k.Secret.Reveal()}, nil
}

// A CreditTicket is a hold on the user's prepaid balance for one request. Amounts are in micros.
type CreditTicket struct {
	Ticket     SealedTicket
	HoldMicros int64
	// AvailableMicros is what the user can still spend after this hold.
	AvailableMicros int64
	// ExpireTime is when the hold is released by itself. Zero in an explanation.
	ExpireTime time.Time
}

// A Denial says why nobody's credential may pay.
type Denial struct {
	Reason    DenialReason
	Retryable bool
	// RetryAfter is how long to wait at least; 0 when the sidecar does not say.
	RetryAfter time.Duration
	// Suggestion is what the user or an operator can do about it: one sentence.
	Suggestion string
}

// Usage is tokens used; nil is not zero: it means that the caller does not know. InputTokens counts cached ones in;
// TotalTokens is the provider's own count.
type Usage struct {
	InputTokens, OutputTokens, CacheReadTokens, CacheWriteTokens, TotalTokens *int64
}

// A RecordRequest says what became of one request.
type RecordRequest struct {
	// Settles is what the decision gave: a *Decision, *KeyHandle, *CreditTicket, SealedHandle or SealedTicket.
	Settles Settles
	Outcome Outcome
	// Usage is nil when the caller does not know.
	Usage *Usage
	// CostMicros is what the request cost, where the caller knows; it wins over Usage.
	CostMicros *int64
	// Model is the model that answered, when it is not the one of the decision.
	Model string
	// Endpoint is the provider's, e.g. /v1/chat/completions.
	Endpoint string
	// ResponseTime is how long the provider took; 0 when that is not known.
	ResponseTime time.Duration
	// HTTPStatus is the provider's; 0 when there is none.
	HTTPStatus int
	// ErrorMessage is the provider's error text, cut to 500 characters. The sidecar strikes out keys.
	ErrorMessage string
	// RetryAfter is how long the provider asked to wait; nil when it did not.
	RetryAfter *time.Duration
}

// Recorded is a record as it was taken. Amounts are in micros.
type Recorded struct {
	RecordID string
	// ChargedMicros is what the user's balance was charged; always 0 for an own key.
	ChargedMicros int64
	// ReleasedMicros is what was held and not charged.
	ReleasedMicros int64
	// BalanceMicros is the balance after the charge, which may be below zero; nil for an own key.
	BalanceMicros *int64
	CostSource    CostSource
	// Replayed: it was taken before, and this is its first answer again.
	Replayed   bool
	Durability Durability
	// KeyState is an own key's state after this record; unspecified for a ticket.
	KeyState KeyState
}

// An Explanation is what Decide would answer now (with no id, handle, ticket or secret), and the way to it.
type Explanation struct {
	Decision *Decision
	Steps    []ExplainStep
}

// An ExplainStep is one step on the way to a decision.
type ExplainStep struct{ Check, Result, Detail string }

// A DecideResult is the answer to one item of DecideMany: one of the two is set.
type DecideResult struct {
	Decision *Decision
	Err      error
}

// A RecordResult is the answer to one item of RecordMany: one of the two is set.
type RecordResult struct {
	Recorded *Recorded
	Err      error
}

// Unsent is a record in the background that did not get through, and why.
type Unsent struct {
	Record RecordRequest
	Err    error
}
